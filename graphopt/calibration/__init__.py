"""Calibration: data through a graph, and the ranges of its values."""

from graphopt.calibration.run import Tapped, calibrate, sample

__all__ = ["Tapped", "calibrate", "sample"]
