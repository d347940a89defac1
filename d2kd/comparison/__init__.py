"""Comparison of several detectors on one data set."""
