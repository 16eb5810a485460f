"""Connectors: vision tokens to a language model's width."""
