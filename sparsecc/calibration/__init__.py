"""What a model does on data: moments of what its layers read, and gradients of its weights."""

from sparsecc.calibration.data import CalibrationData
from sparsecc.calibration.influence import influences
from sparsecc.calibration.statistics import Statistics

__all__ = ["CalibrationData", "Statistics", "influences"]
