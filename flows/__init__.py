"""Prefect flows, which a person runs, schedules or triggers: one flow in each file."""
