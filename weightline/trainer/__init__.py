"""What runs on each rank: partition, baseline, publisher, callback."""
