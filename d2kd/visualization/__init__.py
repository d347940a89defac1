"""Pictures: detections beside each other, curves, and what ERD's and ICD's losses look at."""
