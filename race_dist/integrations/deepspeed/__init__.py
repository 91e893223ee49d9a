"""RACE Attention under DeepSpeed."""
