"""The induction task: ... A B ... A, and the model should say B.

A sequence is an end-of-text token, then distinct random tokens; A stands at position s, uniform in the first half, B at
s + 1, and the last token is A again. Two corruptions, one token each, leave everything else alone:

    replace_B   B becomes B': the sequence now says that B' follows A
    replace_A   the first A becomes another token: nothing in the sequence follows A

The answer is B, the distractor B'. Places: "A", the first one, and "B".
"""

import numpy as np
import torch

from universality.circuits.tasks.base import Task
from universality.errors import StudyError

CORRUPTIONS = ("replace_B", "replace_A")


def make_task(samples: int, length: int, vocab_size: int, end_of_text: int, seed: int) -> Task:
    """Raises StudyError if the vocabulary is too small for the sequence's tokens to be distinct."""
    ordinary = np.delete(np.arange(vocab_size), end_of_text)
    if len(ordinary) < length + 1:
        raise StudyError(
            f"circuits.sequence_length: {length} needs {length + 1} distinct tokens, the vocabulary has {len(ordinary)}"
        )
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(ordinary, length + 1, replace=False) for _ in range(samples)])
    clean = np.concatenate([np.full((samples, 1), end_of_text), drawn[:, : length - 1]], axis=1)
    rows = np.arange(samples)
    position_A = rng.integers(1, length // 2, size=samples)
    clean[:, -1] = clean[rows, position_A]
    distractor, stranger = drawn[:, length - 1], drawn[:, length]
    replace_B, replace_A = clean.copy(), clean.copy()
    replace_B[rows, position_A + 1] = distractor
    replace_A[rows, position_A] = stranger
    return Task(
        name="induction",
        clean=torch.from_numpy(clean),
        corrupted={"replace_B": torch.from_numpy(replace_B), "replace_A": torch.from_numpy(replace_A)},
        answer=torch.from_numpy(clean[rows, position_A + 1]),
        distractor=torch.from_numpy(distractor),
        positions={"A": torch.from_numpy(position_A), "B": torch.from_numpy(position_A + 1)},
    )
