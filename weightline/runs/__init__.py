"""A run of a recipe: preparing it, its folder, its stages, its progress and its summary."""
