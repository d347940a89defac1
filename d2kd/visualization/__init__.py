"""Visualize detections, training curves, ERD's selected locations and ICD's attention."""
