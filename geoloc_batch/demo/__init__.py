"""A small synthetic Europe, and the whole pipeline on it, so that everything runs with no download."""
