"""Triton and Gluon kernels. This package imports neither torch.distributed nor torch.nn."""
