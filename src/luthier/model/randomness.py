"""The random state of a process: kept where something that is no part of the training draws."""

import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the random state of Python, NumPy and torch back behind the block.

    So that a training draws the same numbers however often it was evaluated before, and whether a
    model was converted just now or found in the cache.
    """
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
