"""The one command for a machine with a GPU."""
