"""Thresholds for a model, from images without labels."""
