"""One connection: what a client says, what it is answered, and the WAL it is sent."""
