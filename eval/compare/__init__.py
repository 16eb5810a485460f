"""Scores, their uncertainty, and the rules that a model must meet."""
