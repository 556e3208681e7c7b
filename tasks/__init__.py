"""Prefect tasks: the steps of flows, each of them thin and safe to repeat."""

from weightline.extras import check_installed

check_installed("prefect")
