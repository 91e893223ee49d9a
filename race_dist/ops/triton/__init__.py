"""The attention in Triton kernels: binds the tensors of a call to the kernels of ``race_dist.kernels``.

Forward, causal: sums of each tile's keys and values, a scan over the tiles, the output from the state before each tile.
Backward: a pass over the queries (with the prefix states) that also computes the tiles' parts of the suffix state, the reverse
scan, and a pass over the keys (with the suffix states). Without ``causal`` the scans return totals, and both passes read those.
Nothing here waits for the device.

    plan      which kernels run, with which tiles; what is supported
    launch    arguments that every kernel takes; launches, with compiled kernels cached per signature
    forward   the forward pass
    backward  the backward pass
"""

from race_dist.ops.triton.backward import backward as backward
from race_dist.ops.triton.backward import finish_backward as finish_backward
from race_dist.ops.triton.backward import start_backward as start_backward
from race_dist.ops.triton.forward import finish_forward as finish_forward
from race_dist.ops.triton.forward import forward as forward
from race_dist.ops.triton.forward import start_forward as start_forward
from race_dist.ops.triton.launch import clear_plan_cache as clear_plan_cache
from race_dist.ops.triton.plan import explain as explain
from race_dist.ops.triton.plan import states_shape as states_shape
from race_dist.ops.triton.plan import unsupported as unsupported
