"""A permutation of 0 .. n - 1 that takes no memory: any stretch of it is computed from its key alone.

A Feistel network over ceil(log2 n) bits permutes 0 .. 2^bits - 1: the two halves of a number's bits are, in turn,
combined by exclusive or with a keyed hash of the other half. Numbers that come out at n or above go through again until
they are below it (cycle walking; fewer than two rounds on average, since 2^bits < 2n). Mitchell et al. 2021
("Bandwidth-optimal random shuffling for GPUs", arXiv 2106.06161) test such permutations for uniformity.
"""

from collections.abc import Iterator

import numpy as np

_ROUNDS = 24
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64's finaliser


class Permutation:
    """The permutation of 0 .. n - 1 that `key` draws; 24 words of memory, whatever n."""

    def __init__(self, n: int, key: list[int]):
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The numbers at `positions`, both int64 below n."""
        numbers = self._scramble(positions.astype(np.uint64))
        beyond = np.flatnonzero(numbers >= self.n)
        while len(beyond):
            numbers[beyond] = self._scramble(numbers[beyond])
            beyond = beyond[numbers[beyond] >= self.n]
        return numbers.astype(np.int64)

    def _scramble(self, numbers: np.ndarray) -> np.ndarray:
        high, low = numbers >> self._low, numbers & self._low_mask
        for first, second in zip(self._keys[::2], self._keys[1::2], strict=True):
            high ^= _hash(low, first) & self._high_mask
            low ^= _hash(high, second) & self._low_mask
        return (high << self._low) | low


def _hash(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """64 well-mixed bits for each number."""
    x = (numbers + key) * _MULTIPLIERS[0]
    x ^= x >> np.uint64(29)
    x *= _MULTIPLIERS[1]
    x ^= x >> np.uint64(32)
    return x


def shuffled_epochs(n: int, seed: int, first: int, size: int) -> Iterator[np.ndarray]:
    """Endless stretches of `size` numbers of the sequence that lays permutations of 0 .. n - 1 end to end.

    The permutation of an epoch depends on (seed, epoch) alone; the sequence is entered at position `first`.
    """
    while True:
        parts = []
        missing = size
        while missing:
            epoch, offset = divmod(first, n)
            taken = min(missing, n - offset)
            parts.append(Permutation(n, [seed, epoch])(np.arange(offset, offset + taken)))
            first, missing = first + taken, missing - taken
        yield np.concatenate(parts)
