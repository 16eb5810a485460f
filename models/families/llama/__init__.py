"""LLaMA: the text tower and the chat models' language model."""
