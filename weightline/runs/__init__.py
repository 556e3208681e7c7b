"""One run of a recipe: its folder, checks, progress and summary. Free of Prefect."""
