"""Which tokens a feature's decoder direction promotes, and how peaked that is.

    effect_v = W_U[v] . (gamma * W_dec[i])         logits that a unit of the feature's code adds

with gamma the final norm's weight, whose centring and division shift and scale all tokens alike where the stream is
long beside what the feature writes (direct logit attribution; Elhage et al. 2021, A Mathematical Framework for
Transformer Circuits). peakedness is the excess kurtosis of the effects over the vocabulary: -2 or more, about 0 where
they look drawn from a normal distribution, large where few tokens stand out. It says nothing of what later layers make
of the feature, which for those of early layers is most of it.
"""

from typing import NamedTuple

import numpy as np
import torch

_FEATURES = 256  # whose effects on all tokens are in memory


class LogitEffects(NamedTuple):
    """`peakedness` [F]; `tokens`, `effects` [F, n]: those promoted, the first most."""

    peakedness: np.ndarray
    tokens: np.ndarray
    effects: np.ndarray


@torch.inference_mode()
def logit_effects(W_dec: torch.Tensor, promoting: torch.Tensor, n: int) -> LogitEffects:
    """Of decoder directions [F, D], with `promoting` [V, D] as a LanguageModel has it."""
    peaked, tokens, effects = [], [], []
    for directions in W_dec.split(_FEATURES):
        logits = directions @ promoting.T
        top = logits.topk(min(n, logits.shape[1]), dim=1)
        squares = logits.sub_(logits.mean(1, keepdim=True)).square_()
        second = squares.mean(1)
        peaked.append(squares.square_().mean(1) / second.square().clamp_min(1e-30) - 3)
        tokens.append(top.indices)
        effects.append(top.values)
    return LogitEffects(*(torch.cat(parts).numpy() for parts in (peaked, tokens, effects)))
