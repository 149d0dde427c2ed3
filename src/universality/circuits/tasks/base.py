"""What every task is: prompts in pairs, clean and corrupted, whose answer is the token after the last."""

from typing import NamedTuple

import torch


class Task(NamedTuple):
    """S prompts of L tokens, all int64.

    `clean` [S, L]; `corrupted`: name of the corruption -> [S, L]; the right `answer` [S], and the `distractor` [S] that
    it is set against; `positions`: name of a place in the prompt ("A", "B") -> where it is [S].
    """

    name: str
    clean: torch.Tensor
    corrupted: dict[str, torch.Tensor]
    answer: torch.Tensor
    distractor: torch.Tensor
    positions: dict[str, torch.Tensor]

    def part(self, part: slice) -> "Task":
        return Task(
            self.name,
            self.clean[part],
            {name: tokens[part] for name, tokens in self.corrupted.items()},
            self.answer[part],
            self.distractor[part],
            {name: places[part] for name, places in self.positions.items()},
        )

    def batches(self, size: int) -> list["Task"]:
        return [self.part(slice(start, start + size)) for start in range(0, len(self.clean), size)]
