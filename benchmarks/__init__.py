"""Each module and package here is a command and answers one question (README.md); they share ``common``."""
