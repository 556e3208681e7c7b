"""Calls to a Prefect server through its client: deployments, automations, flow runs, events, artifacts."""
