"""Bytes to values and back: what travels on the wire.  No Twisted, no clock, no files."""
