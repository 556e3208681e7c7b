"""What is asked of a Prefect server through its client: deployments, automations, runs, artifacts."""
