"""Benchmark of several ranks: exactness, scaling, exchange, baselines and a streamed step, in one call with a time limit.

torchrun --nproc-per-node N -m race_dist.benchmarks.scaling --out FILE.json --text FILE
"""
