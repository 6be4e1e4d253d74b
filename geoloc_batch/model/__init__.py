"""Batches in, features out."""
