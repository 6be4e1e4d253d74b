"""Results in, files out, exactly once. No torch."""
