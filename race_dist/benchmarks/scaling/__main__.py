"""The command of this package: see :mod:`race_dist.benchmarks.scaling`."""

from race_dist.benchmarks.scaling.run import main

if __name__ == "__main__":
    main()
