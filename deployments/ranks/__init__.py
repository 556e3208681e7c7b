"""How rank processes record their steps in the flow run of their stage."""
