"""The HTTP interface of a replica: server, client, authentication, metrics."""
