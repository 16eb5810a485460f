"""Parts that every model family is built from, on Megatron-Core modules."""
