"""Training with merging: the recipe, the images, the loop, and what outlives an interrupted run."""
