"""The lineage of versions, from manifests and records, as a graph and as a table. Pure; reads only."""
