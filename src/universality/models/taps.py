"""Taps: the named places ("sites") of a running model where values are read and replaced.

A family's code passes every value that has a name through `taps(site, value)` and goes on with what comes back.
"""

from collections.abc import Callable, Mapping

import torch

Edit = Callable[[torch.Tensor], torch.Tensor]


class Taps:
    """Idle unless a run has set what to capture and what to edit."""

    def __init__(self) -> None:
        self.capture: frozenset[str] = frozenset()
        self.edits: Mapping[str, Edit] = {}
        self.captured: dict[str, torch.Tensor] = {}

    def __call__(self, site: str, value: torch.Tensor) -> torch.Tensor:
        """The value to go on with: edited if an edit is set for the site; captured as edited."""
        edit = self.edits.get(site)
        if edit is not None:
            value = edit(value)
        if site in self.capture:
            self.captured[site] = value
        return value

    def wanted(self, site: str) -> bool:
        return site in self.capture or site in self.edits
