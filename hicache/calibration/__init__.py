"""What was fitted to a model: places of full steps and rows of coefficients, in one JSON file."""
