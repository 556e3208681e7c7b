"""Starts and ends a Prefect server, worker, dashboard and replica together on one machine."""

DEFAULT_PORT = 4200
