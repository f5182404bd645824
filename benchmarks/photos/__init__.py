"""Real weights and real photographs: what merging does to the features of a DINOv2, and to a map that is read off its
patch tokens."""
