"""A keyed permutation of the numbers below n that is computed where it is needed, never stored.

    shuffled(7, n=1000, key=(1337, 0))      # the image of 7 under the permutation of this key

The permutation is a Feistel network of four rounds (Luby and Rackoff, "How to construct
pseudorandom permutations from pseudorandom functions", 1988). Such a network permutes the numbers
of an even number of bits. A result that is not below n goes through the network again until it is,
which keeps the map one-to-one ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002).

Training data is read in the order of these permutations, so a change here changes every run.
"""

from functools import lru_cache

import numpy as np

ROUNDS = 4
MASK_64 = 2**64 - 1


def shuffled(index: int, n: int, key: tuple[int, ...]) -> int:
    """Return the image of `index` under the permutation of range(n) that `key` selects."""
    n_bits = (n - 1).bit_length()
    half_bits = max(1, (n_bits + 1) // 2)
    half_mask = 2**half_bits - 1
    round_keys = _round_keys(key)
    while True:
        left = index >> half_bits
        right = index & half_mask
        for round_key in round_keys:
            mixed = _mix(right ^ round_key) & half_mask
            left, right = right, left ^ mixed
        index = (left << half_bits) | right
        if index < n:
            return index


def permute(indices: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Return the images of all `indices`, as int64."""
    images = [shuffled(int(index), n, key) for index in indices]
    return np.array(images, dtype=np.int64)


@lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...]) -> list[int]:
    return np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64).tolist()


def _mix(x: int) -> int:
    """Return the finaliser of SplitMix64: every bit of x influences every bit of the result.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & MASK_64
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)
