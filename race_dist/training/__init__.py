"""Training a language model: configuration, data, optimizer, loop."""
