"""InternViT: the vision encoder."""
