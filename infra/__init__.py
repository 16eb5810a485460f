"""Layer 1: what everything stands on. Imports nothing of ours."""
