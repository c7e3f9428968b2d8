"""Seeded draws that are the same on every machine and under every version of NumPy.

NumPy's compatibility policy (NEP 19) lets the methods that shuffle and permute change their streams
between versions. So an order here is a sort of random bits, of which there are two sources:

- `scatter` hashes numbers with a seed of any values: the finaliser of SplitMix64 (Steele, Lea and
  Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), a bijection of 64 bits. It
  decides splits and mixtures, where a number stands for the content of a row.
- `random_bits` gives the raw bits of PCG64, which NEP 19 keeps as they are. It decides the order of
  batches and where equally long rows are packed.

Both stay: the orders that a seed gave in an earlier version must not change.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

UInt64s = NDArray[np.uint64]
RowNumbers = NDArray[np.int64]
"""Numbers of rows in a table, a source, or several sources laid end to end."""


def scatter(values: UInt64s, *seed: object) -> UInt64s:
    """Return an evenly spread 64-bit number for each value; another seed gives other numbers.

    `seed` may hold numbers and texts.
    """
    digest = blake2b(repr(seed).encode(), digest_size=8).digest()
    mixed = values ^ np.uint64(int.from_bytes(digest, "little"))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def seeded_order(count: int, *seed: object) -> RowNumbers:
    """Return the numbers 0 to `count` - 1 in an order by `scatter`."""
    return np.argsort(scatter(np.arange(count, dtype=np.uint64), *seed), kind="stable")


def random_bits(count: int, *seed: int) -> UInt64s:
    """Draw `count` random uint64 from non-negative integers, such as a seed and an epoch."""
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)


def random_order(count: int, *seed: int) -> RowNumbers:
    """Return the numbers 0 to `count` - 1 in an order by `random_bits`."""
    return np.argsort(random_bits(count, *seed), kind="stable")
