"""Data structures shared by losses, detectors and data sets."""
