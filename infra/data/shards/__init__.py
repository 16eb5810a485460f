"""Shards: written, read in order, mixed, packed."""
