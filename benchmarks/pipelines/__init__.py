"""How fast a denoising loop is."""
