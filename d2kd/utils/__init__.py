"""Errors, files, processes, versions: helpers for all other packages, of which this one imports none."""
