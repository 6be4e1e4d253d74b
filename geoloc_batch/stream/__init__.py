"""Shards in, fixed uint8 batches out."""
