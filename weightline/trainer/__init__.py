"""Publishes versions from a training job: partition, baseline, publisher and callback of each rank."""
