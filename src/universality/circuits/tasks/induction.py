"""The induction task: ... A B ... A, and the model should say B.

A sequence is an end-of-text token, then distinct random tokens; A stands at position s, uniform in the first half, B at
s + 1, and the last token is A again. Instead s may be fixed, or the distance from B to the last A. Corruptions:

    replace_B   B becomes B': the sequence now says that B' follows A
    replace_A   the first A becomes another token: nothing in the sequence follows A
    no_repeat   replace_A, and B becomes another token as well, not B': no token of the sequence stands there twice, and
                B nowhere
    random      all tokens but the first and the last are drawn anew, uniform and independent; A or B may be among them

The first two change one token, the third two. The answer is B, the distractor B', under all of them. Places: "A", the
first one, and "B".
"""

import numpy as np
import torch

from universality.circuits.tasks.base import Task
from universality.errors import StudyError

CORRUPTIONS = ("replace_B", "replace_A")
"""Those that change one token."""


def make_task(
    samples: int,
    length: int,
    vocab_size: int,
    end_of_text: int,
    seed: int,
    *,
    position: int | None = None,
    distance: int | None = None,
    key: str = "circuits.sequence_length",
) -> Task:
    """`position` is that of the first A, `distance` the tokens from B to the last A; both may be 1 to length - 3.

    Raises StudyError, naming the length's `key`, if the vocabulary is too small for the tokens to be distinct.
    """
    ordinary = np.delete(np.arange(vocab_size), end_of_text)
    if len(ordinary) < length + 1:
        raise StudyError(f"{key}: {length} needs {length + 1} distinct tokens, the vocabulary has {len(ordinary)}")
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(ordinary, length + 1, replace=False) for _ in range(samples)])
    start = np.full((samples, 1), end_of_text)
    clean = np.concatenate([start, drawn[:, : length - 1]], axis=1)
    position_A = draw_positions(rng, samples, length, position, distance)
    rows = np.arange(samples)
    A, B = clean[rows, position_A], clean[rows, position_A + 1]
    other, distractor, stranger = drawn[:, length - 2 :].T  # `other` would be last, where A stands
    anew = np.random.default_rng([seed, 1]).choice(ordinary, (samples, length - 1))
    return plant("induction", clean, position_A, (A, B, distractor, stranger, other), np.hstack([start, anew]))


def draw_positions(
    rng: np.random.Generator, samples: int, length: int, position: int | None, distance: int | None
) -> np.ndarray:
    """Where the first A stands [S]: fixed, or uniform in the first half."""
    if distance is not None:
        position = length - 2 - distance
    if position is not None:
        return np.full(samples, position)
    return rng.integers(1, length // 2, size=samples)


def plant(
    name: str, around: np.ndarray, position_A: np.ndarray, tokens: tuple[np.ndarray, ...], random: np.ndarray
) -> Task:
    """The task with A and B put into the prompts `around` [S, L], and A into the last place of these and of `random`.

    `tokens` [S] each: A, B, the distractor B', what A becomes in replace_A and no_repeat, and what B does in no_repeat.
    """
    A, B, distractor, stranger, other = tokens
    rows, position_B = np.arange(len(around)), position_A + 1

    def changed(prompts: np.ndarray, A: np.ndarray, B: np.ndarray) -> torch.Tensor:
        prompts = prompts.copy()
        prompts[rows, position_A], prompts[rows, position_B] = A, B
        return torch.from_numpy(prompts)

    around, random = around.astype(np.int64), random.astype(np.int64)
    around[:, -1] = random[:, -1] = A
    return Task(
        name=name,
        clean=changed(around, A, B),
        corrupted={
            "replace_B": changed(around, A, distractor),
            "replace_A": changed(around, stranger, B),
            "no_repeat": changed(around, stranger, other),
            "random": torch.from_numpy(random),
        },
        answer=torch.from_numpy(B.astype(np.int64)),
        distractor=torch.from_numpy(distractor.astype(np.int64)),
        positions={"A": torch.from_numpy(position_A), "B": torch.from_numpy(position_B)},
    )
