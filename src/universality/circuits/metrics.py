"""What a model says at the end of a prompt.

    logit_diff   logit(answer) - logit(distractor), which no offset common to all logits moves
    log_prob     log p(answer), nats
    prob         p(answer)
    logit        logit(answer) alone, for comparison with published raw logits: an offset moves it
    top1         1 where the answer has the largest logit, else 0

The effect of a patch is the patched value minus the clean one.
"""

import torch

from universality.circuits.tasks.base import Task

_ROWS = 16
"""Normalised at once: their copies stay in the cache."""


def measure(logits: torch.Tensor, task: Task) -> torch.Tensor:
    """METRICS [S, 5] of the logits [S, V] at the last position."""
    rows = torch.arange(len(logits), device=logits.device)
    answer, distractor = (x.to(logits.device) for x in (task.answer, task.distractor))
    right = logits[rows, answer]
    parts = zip(logits.split(_ROWS), answer.split(_ROWS), strict=True)
    log_prob = torch.cat([torch.log_softmax(part, -1).gather(1, a[:, None])[:, 0] for part, a in parts])
    top1 = (logits.argmax(-1) == answer).to(logits)
    return torch.stack([right - logits[rows, distractor], log_prob, log_prob.exp(), right, top1], dim=1)
