"""What every test runs under: few threads, so that test processes and the ranks they start share the cores."""

from __future__ import annotations

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a shell that starts the tests in the background; some press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch  # after the settings above

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: its kernels then run on CPU tensors

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
