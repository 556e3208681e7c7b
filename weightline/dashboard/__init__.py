"""A read-only web app that draws chains from their buckets alone. `weightline dashboard BUCKET...` serves it."""
