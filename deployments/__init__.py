"""Deploys the flows to a Prefect server and runs them: deployments, recipes, the worker type, the local stack."""
