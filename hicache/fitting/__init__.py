"""``hicache.calibrate(pipe, prompts)``: rows of coefficients, and places of full steps, fitted to a model."""

from hicache.fitting.calibrate import METHODS, CalibrationRefused, calibrate

__all__ = ["METHODS", "CalibrationRefused", "calibrate"]
