"""How many preceding tokens must the model see for a feature to fire as it does?

Each top context is cut to its last 1, 2, 3, 4, 6, 8, 12, ... tokens, led by an end-of-text token as the sequences
that the model was trained on, and the model and SAE are run on what is left. The context needed is

    min { l : f(last l tokens) >= 0.9 f(whole) }        tokens, the feature's own included

and a feature's is the median over its contexts: 1 for a feature of the current token. Range: 1 to the length of a
sequence. It overestimates where a shorter context happens to be out of distribution; a feature that falls below 90%
again with more tokens is said to need the fewer. Contexts that end before the shortest length that decides are as
long as they are.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from universality.runtime import progress

REACHED = 0.9
"""The share of its value that a feature must reach."""
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

Activation = Callable[[torch.Tensor, np.ndarray], np.ndarray]
"""Tokens [B, L], a feature for each [B] -> the features' values at the last tokens [B]."""


def context_needed(
    tokens: Sequence[np.ndarray], features: np.ndarray, activation: Activation, end_of_text: int, batch_size: int
) -> np.ndarray:
    """Tokens [C] that each context needs: `tokens` [C] arrays of the tokens from the start of its sequence to the
    feature's own, `features` [C]; NaN where the feature is silent on the whole context."""
    lengths = np.array([len(context) for context in tokens])
    whole = np.full(len(tokens), np.nan)
    needed = np.full(len(tokens), np.nan)
    for length in sorted({*lengths.tolist()}):
        of_length = np.flatnonzero(lengths == length)
        whole[of_length] = _values(tokens, features, of_length, length, activation, end_of_text, batch_size)
    firing = whole > 0
    for length in progress([n for n in LENGTHS if n <= lengths.max(initial=0)], "contexts cut, lengths"):
        open_ = np.flatnonzero(firing & np.isnan(needed) & (lengths > length))
        values = _values(tokens, features, open_, length, activation, end_of_text, batch_size)
        needed[open_[values >= REACHED * whole[open_]]] = length
    left = firing & np.isnan(needed)
    needed[left] = lengths[left]
    return needed


def _values(
    tokens: Sequence[np.ndarray],
    features: np.ndarray,
    chosen: np.ndarray,
    length: int,
    activation: Activation,
    end_of_text: int,
    batch_size: int,
) -> np.ndarray:
    """Of the chosen contexts, cut to their last tokens [len(chosen)]."""
    found = [np.empty(0)]
    for start in range(0, len(chosen), batch_size):
        batch = chosen[start : start + batch_size]
        cut = np.stack([tokens[k][-length:] for k in batch]).astype(np.int64)
        led = np.concatenate([np.full((len(cut), 1), end_of_text), cut], axis=1)
        found.append(activation(torch.from_numpy(led), features[batch]))
    return np.concatenate(found)
