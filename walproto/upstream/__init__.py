"""WAL from a live server: received, made durable, shown to those who serve it."""
