"""The induction task: ... A B ... A, and the model should say B.

A sequence is an end-of-text token, then distinct random tokens; A stands at position s, uniform in the first half, B at
s + 1, and the last token is A again. Two corruptions, one token each, leave everything else alone:

    replace_B   B becomes B': the sequence now says that B' follows A
    replace_A   the first A becomes another token: nothing in the sequence follows A

Metrics at the last position: logit_diff = logit(B) - logit(B'), which no common offset moves; log_prob = log p(B); and
logit(B) for comparison with published raw logits. The effect of a patch is the patched value minus the clean one.
"""

from typing import NamedTuple

import numpy as np
import torch

from universality.errors import StudyError

CORRUPTIONS = ("replace_B", "replace_A")
METRICS = ("logit_diff", "log_prob", "logit")


class InductionTask(NamedTuple):
    """`clean` [S, L]; `corrupted`: name -> [S, L]; `position_B`, `answer`, `distractor` [S], int64."""

    clean: torch.Tensor
    corrupted: dict[str, torch.Tensor]
    position_B: torch.Tensor
    answer: torch.Tensor
    distractor: torch.Tensor

    def batch(self, part: slice) -> "InductionTask":
        corrupted = {name: tokens[part] for name, tokens in self.corrupted.items()}
        return InductionTask(
            self.clean[part], corrupted, self.position_B[part], self.answer[part], self.distractor[part]
        )


def make_task(samples: int, length: int, vocab_size: int, end_of_text: int, seed: int) -> InductionTask:
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
    return InductionTask(
        clean=torch.from_numpy(clean),
        corrupted={"replace_B": torch.from_numpy(replace_B), "replace_A": torch.from_numpy(replace_A)},
        position_B=torch.from_numpy(position_A + 1),
        answer=torch.from_numpy(clean[rows, position_A + 1]),
        distractor=torch.from_numpy(distractor),
    )


def measure(logits: torch.Tensor, task: InductionTask) -> torch.Tensor:
    """METRICS at the last position of `logits` [S, L, V] for each sequence: [S, 3]."""
    last = logits[:, -1]
    rows = torch.arange(len(last))
    right = last[rows, task.answer]
    return torch.stack(
        [right - last[rows, task.distractor], torch.log_softmax(last, -1)[rows, task.answer], right], dim=1
    )
