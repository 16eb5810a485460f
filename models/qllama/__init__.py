"""QLLaMA: LLaMA with learnable queries that look at an image."""
