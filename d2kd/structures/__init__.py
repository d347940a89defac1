"""Plain data that losses, detectors and data sets have in common."""
