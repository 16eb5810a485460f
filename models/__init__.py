"""What is trained: the model families, their four compositions, and the losses."""
