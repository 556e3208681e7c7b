"""What flows are made of: thin Prefect tasks that call weightline, and the processes that a local stack consists of."""
