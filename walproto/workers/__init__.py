"""More than one core: other processes that send WAL."""
