"""What is known of one cluster's WAL: how far it goes, along which timelines, and who reads it."""
