"""Images, sources, rules and shards: what training data are made of."""
