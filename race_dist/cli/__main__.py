"""``python -m race_dist.cli``: the command where only the interpreter is at hand, as under torchrun."""

from race_dist.cli import main

main()
