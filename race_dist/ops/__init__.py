"""The attention on one rank: validation, autograd, and the backends reference, chunked and triton (docs/architecture.md)."""
