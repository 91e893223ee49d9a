"""From files of text to batches of tokens: corpora, tokenizers, packing, positions."""
