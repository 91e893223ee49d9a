"""The attention in chunks, in plain PyTorch: exact, linear in T, on any device.

Tokens of one chunk attend to each other by a ``[C, C]`` product, and to all earlier tokens by the state. Nothing of shape
``[T, S]`` or ``[T, T]`` is ever stored; features are recomputed wherever they are needed. States have the augmented form
``[S, E]`` with ``E = Dv + 1``: the sketch's values, and its mass as one more column, that of value rows ``[v | 1]``.
The state that runs along the tiles is float64: its sums lose no digits at any length.

Shapes: B batch, H key/value heads, n chunks, C tokens per chunk, Q = Hq / Hkv * C query rows per chunk.
"""

from race_dist.ops.chunked.backward import backward as backward
from race_dist.ops.chunked.backward import finish_backward as finish_backward
from race_dist.ops.chunked.backward import start_backward as start_backward
from race_dist.ops.chunked.forward import finish_forward as finish_forward
from race_dist.ops.chunked.forward import forward as forward
from race_dist.ops.chunked.forward import start_forward as start_forward
from race_dist.ops.chunked.forward import states_shape as states_shape
from race_dist.ops.chunked.forward import unsupported as unsupported
