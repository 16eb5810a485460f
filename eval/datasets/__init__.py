"""Data sets under test: a concept set or a pair set."""
