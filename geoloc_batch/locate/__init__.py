"""Features in, places out."""
