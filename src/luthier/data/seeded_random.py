"""Seeded draws that are the same on every machine and under every version of numpy.

numpy's own generators may change their streams between versions (NEP 19), so a draw here is a
ranking by a hash: the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), a bijection of 64-bit words.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

UInt64s = NDArray[np.uint64]


def scatter(values: UInt64s, *seed: object) -> UInt64s:
    """Evenly spread 64-bit numbers, one for each word; other seeds (numbers, texts) give others."""
    mixed = values ^ _key(seed)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def seeded_order(count: int, *seed: object) -> NDArray[np.int64]:
    """The positions 0 to `count` - 1 in an order that the seed decides."""
    return np.argsort(scatter(np.arange(count, dtype=np.uint64), *seed), kind="stable")


def _key(seed: tuple[object, ...]) -> np.uint64:
    digest = blake2b(repr(seed).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


# Random orders that are the same on every machine and for every version of NumPy.

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
