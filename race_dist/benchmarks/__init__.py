"""Benchmarks that ship with the package: ``race-dist bench ...``. Each times its peers in the same run."""
