"""One call of a denoiser: which step it is, what is done with it, and what is kept of it for the next ones."""
