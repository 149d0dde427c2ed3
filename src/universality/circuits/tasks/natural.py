"""Induction in text: the induction task with held-out text around the pair.

A prompt is an end-of-text token, then a window of a held-out sequence, which may run over the end of a document. A and
B are tokens that do not occur in the window, drawn uniformly; they take the places s and s + 1, and A the last one.
Corruptions, answer and places are those of the induction task, and the tokens put in do not occur in the window either.
`random` is a window of another sequence with A in its last place; none of the tokens put in occurs there otherwise.
"""

import numpy as np

from universality.circuits.tasks.base import Task
from universality.circuits.tasks.induction import draw_positions, plant
from universality.errors import StudyError

_PLANTED = 5  # A, B, B' and what A and B become in no_repeat


def make_task(
    samples: int,
    length: int,
    sequences: np.ndarray,
    vocab_size: int,
    end_of_text: int,
    seed: int,
    *,
    position: int | None = None,
    distance: int | None = None,
    key: str = "circuits.tasks.natural_induction",
) -> Task:
    """`sequences` [n, L'] of held-out tokens, each led by an end-of-text token, L' >= length; no two prompts' windows
    are of one sequence if there are enough. `position` and `distance` as in induction.

    Raises StudyError, beginning with `key`, if there is one sequence only, or too few tokens do not occur in a window.
    """
    if len(sequences) < 2:
        raise StudyError(f"{key}: needs at least 2 sequences of held-out tokens, there are {len(sequences)}")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(sequences), samples, replace=samples > len(sequences))
    around = _windows(rng, sequences, chosen, length, end_of_text)
    position_A = draw_positions(rng, samples, length, position, distance)
    others = np.random.default_rng([seed, 1])
    elsewhere = (chosen + others.integers(1, len(sequences), size=samples)) % len(sequences)
    random = _windows(others, sequences, elsewhere, length, end_of_text)
    ordinary = np.delete(np.arange(vocab_size), end_of_text)
    planted = np.empty((samples, _PLANTED), dtype=np.int64)
    for row, windows in enumerate(np.hstack([around, random])):
        absent = np.setdiff1d(ordinary, windows)
        if len(absent) < _PLANTED:
            raise StudyError(
                f"{key}: needs {_PLANTED} tokens that do not occur in the text around them, but windows of "
                f"length={length} leave {len(absent)} of the vocabulary's {len(ordinary)}"
            )
        planted[row] = rng.choice(absent, _PLANTED, replace=False)
    return plant("natural_induction", around, position_A, tuple(planted.T), random)


def _windows(
    rng: np.random.Generator, sequences: np.ndarray, chosen: np.ndarray, length: int, end_of_text: int
) -> np.ndarray:
    """[S, length]: an end-of-text token, then tokens of each of the `chosen` sequences from a uniform start on."""
    starts = rng.integers(1, sequences.shape[1] - length + 2, size=len(chosen))
    text = sequences[chosen[:, None], starts[:, None] + np.arange(length - 1)]
    return np.hstack([np.full((len(chosen), 1), end_of_text), text])
