"""Benchmarks that ship with the package: ``race-dist bench ...``. Each times its baselines in the same run."""
