"""What of a call a CUDA graph cannot capture."""
