"""The replicas of a chain as a group: finding them, and moving them to a version in waves. Free of Prefect."""
