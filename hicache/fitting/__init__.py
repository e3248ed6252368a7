"""``hicache.calibrate(pipe, prompts)``: rows of coefficients, and places of full steps, fitted to a model."""

from hicache.fitting.calibrate import METHODS, PLACES, CalibrationRefused, calibrate

__all__ = ["METHODS", "PLACES", "CalibrationRefused", "calibrate"]
