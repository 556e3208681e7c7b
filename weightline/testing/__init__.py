"""Parts for testing what is built on weightline. They ship with the package; nothing in it imports them."""
