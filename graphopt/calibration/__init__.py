"""Calibration: data through a graph, and the ranges of its values."""

from graphopt.calibration.run import Tapped, calibrate, feeds_of, in_order, means, sample, second_moments

__all__ = ["Tapped", "calibrate", "feeds_of", "in_order", "means", "sample", "second_moments"]
