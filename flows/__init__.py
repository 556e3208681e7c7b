"""What a person runs, schedules or triggers: one file a flow. `python -m flows` runs a pipeline on one machine."""
