"""The parts of pack.py: where photos come from, what is told about them, and the folder that gets the shards."""
