"""Plans and executes the way from one state to another."""
