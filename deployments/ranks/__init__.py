"""Records the steps of rank processes in the flow run of their stage."""
