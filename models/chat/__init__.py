"""Conversations: the official templates, label masks, tokenizers and the chat jsonl format."""
