#!/usr/bin/env bash
# Creates a virtual environment with the software of the container, on x86-64 or aarch64 (GH200). Run it on a compute node, or on
# a login node of the same architecture; choose a folder that all nodes can read.
#   launch/templates/make-venv.sh /projects/PROJECT/venv            from a checkout of the repository
#   TORCH='torch==2.11.*' launch/templates/make-venv.sh VENV        another version
#   SYSTEM_TORCH=1 launch/templates/make-venv.sh VENV               keep the torch of a module that is loaded
#   INDEX=https://download.pytorch.org/whl/cpu launch/templates/make-venv.sh VENV     another index, here the CPU's
set -euo pipefail

venv=${1:?"usage: make-venv.sh VENV"}
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
torch=${TORCH:-torch>=2.9}
pip=("$venv/bin/python" -m pip --disable-pip-version-check install)

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "race-dist needs Python 3.11 or newer; $python is not: PYTHON=/path/to/python3.11 $0 $venv" >&2
    exit 1
}
if [ -n "${SYSTEM_TORCH:-}" ]; then
    "$python" -m venv --system-site-packages "$venv"
    "$python" -c 'import torch' || {
        echo "SYSTEM_TORCH is set, but $python has no torch: load its module first" >&2
        exit 1
    }
    "${pip[@]}" --quiet 'setuptools>=77'
else
    "$python" -m venv "$venv"
    "${pip[@]}" --quiet ${INDEX:+--extra-index-url "$INDEX"} "$torch" 'setuptools>=77'
fi
"${pip[@]}" --quiet --no-build-isolation "${source}[triton,slurm,nvml]"
"$venv/bin/race-dist" --version
"$venv/bin/python" - <<'PYTHON'
import platform

import torch

gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible here"
print(f"{platform.machine()}, torch {torch.__version__}, CUDA {torch.version.cuda}, GPU: {gpu}")
PYTHON
