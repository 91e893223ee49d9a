"""What several ranks are worth: exactness, scaling, exchange, peers and a streamed step, in one call with a time limit.

torchrun --nproc-per-node N -m race_dist.benchmarks.scaling --out FILE.json --text FILE
"""
