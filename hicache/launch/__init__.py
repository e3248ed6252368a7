"""From a file of prompts to pictures and videos: ``hicache generate`` (docs/generate.md)."""
