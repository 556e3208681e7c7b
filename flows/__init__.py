"""Contains the Prefect flows, which a person runs, schedules or triggers."""

from weightline.extras import check_installed

check_installed("prefect")
