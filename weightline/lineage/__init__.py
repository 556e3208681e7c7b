"""What became of every version: manifests and records, drawn as a graph and told as a table. Pure; reads only."""
