"""In-context recall: k1 v1 k2 v2 ... kn vn, filler, kq, and the model should say vq (Arora et al. 2023, arXiv
2312.04927, with one question).

A prompt is an end-of-text token, then distinct random tokens, the queried key again at the end. Corruptions:

    replace_value   vq becomes a token that is not in the prompt
    swap_values     vq and another pair's value, of a pair drawn uniformly, change places
    random          all tokens but the first and the last are drawn anew, uniform and independent

The answer is vq; the distractor is the token that replace_value puts in ("absent") or the value that swap_values does
("other_value"). Places: "key", where kq stands first, and "value".
"""

from typing import Literal

import numpy as np
import torch

from universality.circuits.tasks.base import Task
from universality.errors import StudyError


def make_task(
    samples: int,
    pairs: int,
    vocab_size: int,
    end_of_text: int,
    seed: int,
    *,
    queried: int | None = None,
    filler: int = 0,
    distractor: Literal["absent", "other_value"] = "absent",
    key: str = "circuits.tasks.recall",
) -> Task:
    """Prompts of 2 * pairs + filler + 2 tokens; `queried` is a pair's number from 0, drawn for each prompt if None.

    Raises StudyError, beginning with `key`, if the vocabulary is too small for the prompt's tokens to be distinct.
    """
    ordinary = np.delete(np.arange(vocab_size), end_of_text)
    needed = 2 * pairs + filler + 1
    if len(ordinary) < needed:
        raise StudyError(
            f"{key}: pairs={pairs} with {filler} tokens of filler need {needed} distinct tokens, the vocabulary has "
            f"{len(ordinary)}"
        )
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(ordinary, needed, replace=False) for _ in range(samples)])
    asked = rng.integers(0, pairs, size=samples) if queried is None else np.full(samples, queried)
    other = (asked + rng.integers(1, pairs, size=samples)) % pairs
    rows = np.arange(samples)
    place_key, place_value, place_other = 1 + 2 * asked, 2 + 2 * asked, 2 + 2 * other
    start = np.full((samples, 1), end_of_text)
    clean = np.hstack([start, drawn])
    absent = drawn[:, -1]
    clean[:, -1] = clean[rows, place_key]
    answer, other_value = clean[rows, place_value], clean[rows, place_other]
    replaced, swapped = clean.copy(), clean.copy()
    replaced[rows, place_value] = absent
    swapped[rows, place_value], swapped[rows, place_other] = other_value, answer
    random = np.hstack([start, np.random.default_rng([seed, 1]).choice(ordinary, (samples, needed))])
    random[:, -1] = clean[:, -1]
    corrupted = {"replace_value": replaced, "swap_values": swapped, "random": random}
    return Task(
        name="recall",
        clean=torch.from_numpy(clean),
        corrupted={name: torch.from_numpy(prompts) for name, prompts in corrupted.items()},
        answer=torch.from_numpy(answer),
        distractor=torch.from_numpy(absent if distractor == "absent" else other_value),
        positions={"key": torch.from_numpy(place_key), "value": torch.from_numpy(place_value)},
    )
