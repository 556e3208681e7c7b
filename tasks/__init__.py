"""Contains the Prefect tasks, which are the steps of flows. Every task is thin and safe to repeat."""

from weightline.extras import check_installed

check_installed("prefect")
