"""What a Neon safekeeper's WAL sender does beyond PostgreSQL's: many timelines, call-backs."""
