"""What checkpoints, chains and clusters cost: measured on data at hand, or computed for those that are not."""
