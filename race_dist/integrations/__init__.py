"""Adapters that put RACE Attention into other trainers: one package a host, each imported on its own."""
