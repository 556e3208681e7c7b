"""A read-only web app that shows chains from their buckets alone. `weightline dashboard BUCKET...` serves it."""
