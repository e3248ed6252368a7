"""One call of a denoiser: which step it is, what is done with it, what is kept for the next ones."""
