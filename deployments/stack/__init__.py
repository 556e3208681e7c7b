"""A Prefect server, worker, dashboard and replica on one machine, started and ended together."""

DEFAULT_PORT = 4200
