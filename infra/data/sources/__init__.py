"""Readers of data sets in the layouts that people have."""
