"""A replica: prepares a version, applies it in place, proves it, and registers itself in the bucket."""
