"""The attention on one rank: by definition, in chunks, in Triton kernels. The contract is in docs/architecture.md."""
