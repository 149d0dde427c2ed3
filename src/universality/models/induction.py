"""Has a model learned induction? On random tokens repeated once, the second half is predictable from the first."""

from typing import NamedTuple

import numpy as np
import torch

from universality.models.batches import random_tokens
from universality.models.language_model import LanguageModel


class InductionScore(NamedTuple):
    """Mean log-probability of the right token in each half (nats), their difference, and top-1 in the second half.

    The first token of each half is left out: nothing foretells where the repetition begins.
    """

    first_half: float
    second_half: float
    gain: float
    top1: float


def repeated_sequences(n: int, length: int, vocab_size: int, end_of_text: int, seed: int) -> torch.Tensor:
    """[n, 1 + 2h] with h = (length - 1) // 2: an end-of-text token, then h uniform random tokens twice."""
    half = (length - 1) // 2
    tokens = random_tokens(np.random.default_rng(seed), (n, half), vocab_size, end_of_text)
    return torch.from_numpy(np.concatenate([np.full((n, 1), end_of_text), tokens, tokens], axis=1))


@torch.inference_mode()
def induction_score(model: LanguageModel, sequences: torch.Tensor) -> InductionScore:
    half = (sequences.shape[1] - 1) // 2
    log_probs = torch.log_softmax(model.run(sequences).logits[:, :-1], dim=-1)
    right = log_probs.gather(2, sequences[:, 1:, None])[..., 0]
    hits = (log_probs.argmax(-1) == sequences[:, 1:]).float()
    first, second = float(right[:, 1:half].mean()), float(right[:, half + 1 :].mean())
    return InductionScore(first, second, second - first, float(hits[:, half + 1 :].mean()))
