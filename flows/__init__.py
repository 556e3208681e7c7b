"""Prefect flows, which a person runs, schedules or triggers: one flow in each file."""

from weightline.extras import check_installed

check_installed("prefect")
