"""What merging costs and changes: models, images, evaluation, speed, pictures, provenance."""
