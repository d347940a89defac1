"""What several detectors find in the same images, and how they differ."""
