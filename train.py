"""Train a recipe: compose the configuration, validate it, run it. `python train.py --help`."""

import sys

from luthier.cli.train import main, train

if __name__ == "__main__":
    sys.exit(main(train))
