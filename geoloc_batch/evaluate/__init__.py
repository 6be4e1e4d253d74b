"""Predictions against the truth: metrics, what is wrong with either, a row for each photo."""
