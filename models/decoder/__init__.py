"""The causal decoder that language-model families share."""
