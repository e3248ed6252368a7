"""CUDA graphs of full and skipped steps: captured once a form of call, replayed with new numbers."""
