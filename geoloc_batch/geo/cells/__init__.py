"""Builders of partitions, one kind a file."""
