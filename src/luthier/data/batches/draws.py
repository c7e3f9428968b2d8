"""Random orders that are the same on every machine and for every version of NumPy."""

import numpy as np

Array = np.ndarray


def random_bits(count: int, *seed: int) -> Array:
    """Draw `count` random uint64 from non-negative integers, such as a seed and an epoch.

    Only the raw bits of a generator are promised to stay as they are by NumPy's compatibility
    policy (NEP 19); the methods that shuffle and permute are not.
    """
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)


def random_order(count: int, *seed: int) -> Array:
    """Return the numbers from 0 to `count` (int64) in a random order."""
    return np.argsort(random_bits(count, *seed), kind="stable")
