"""Calls a Prefect server through its client: deployments, automations, flow runs, events and artifacts."""

from weightline.extras import check_installed

check_installed("prefect")
