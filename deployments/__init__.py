"""How a Prefect server knows the flows and runs them: recipes, deployments, the worker type, the local stack."""
