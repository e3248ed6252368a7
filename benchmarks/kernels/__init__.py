"""How fast an op is."""
