"""Experiments with real weights on photographs: what merging changes in a DINOv2's features and in a saliency map that
a decoder reads from its patch tokens."""
