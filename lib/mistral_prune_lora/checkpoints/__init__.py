"""What lies in a directory: a model, a bundle, an adapter, a tokenizer, and what they say about themselves."""
