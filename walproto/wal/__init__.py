"""WAL as it lies on disk: its formats, its records, its files.  No Twisted."""
