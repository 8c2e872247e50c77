"""Measurements of walproto beside PostgreSQL's own, each in one run on one machine."""
