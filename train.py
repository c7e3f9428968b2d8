"""Train a recipe: compose the configuration, validate it, run it. `python train.py --help`."""

import sys

from luthier.app import main
from luthier.config import Loaded


def task(loaded: Loaded) -> int | None:
    """Run a valid configuration; torch is imported here and not before."""
    from luthier.train.run import run

    return run(loaded)


if __name__ == "__main__":
    sys.exit(main(task))
