"""Taps: the named places ("sites") of a running model where values are read and replaced.

A family's code passes every value that has a name through `taps(site, value)` and goes on with what comes back. Sites
whose value belongs to one position of the sequence, such as the state of a recurrence, are named with it:
`mamba.3.state@17`, counted from 0, or from the end if negative.
"""

from collections.abc import Callable, Iterable, Mapping

import torch

from universality.errors import StudyError

Edit = Callable[[torch.Tensor], torch.Tensor]
Shape = tuple[int | str, ...]
"""A site's shape; "B" is the batch, "L" the length of the sequence, "P" a position and all before it."""


class Taps:
    """Idle unless a run has set what to capture and what to edit."""

    def __init__(self) -> None:
        self.capture: frozenset[str] = frozenset()
        self.edits: Mapping[str, Edit] = {}
        self.captured: dict[str, torch.Tensor] = {}
        self.length = 0
        """Tokens a sequence of the run that is going on; 0 between runs."""

    def set(self, capture: Iterable[str], edits: Mapping[str, Edit], length: int) -> None:
        """What the next run wants. Raises StudyError within another run of the same model."""
        if self.length:
            raise StudyError("a run within a run of the same model: an edit must not run the model that it edits")
        self.capture, self.edits, self.length = frozenset(capture), edits, length

    def reset(self) -> None:
        self.capture, self.edits, self.captured, self.length = frozenset(), {}, {}, 0

    def __call__(self, site: str, value: torch.Tensor) -> torch.Tensor:
        """The value to go on with: edited if an edit is set for the site; captured as edited."""
        edit = self.edits.get(site)
        if edit is not None:
            value = _checked(site, edit(value), value)
        if site in self.capture:
            self.captured[site] = value
        return value

    def wanted(self, *sites: str) -> bool:
        return any(site in self.capture or site in self.edits for site in sites)

    def wanted_below(self, prefix: str, except_for: str = "") -> bool:
        """Is any site wanted, but for one, whose name begins so?"""
        return any(site.startswith(prefix) and site != except_for for site in (*self.capture, *self.edits))

    def positions(self, *names: str) -> dict[int, list[str]]:
        """Positions at which one of `names` is wanted, in order, each with the wanted sites that mean it."""
        found: dict[int, list[str]] = {}
        for site in sorted({*self.capture, *self.edits}):
            name, _, position = site.partition("@")
            if name in names:
                found.setdefault(int(position) % self.length, []).append(site)
        return dict(sorted(found.items()))


def _checked(site: str, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The edited value in the old one's dtype. A shape that would broadcast is refused: not all that follows would."""
    if not isinstance(new, torch.Tensor) or new.shape != old.shape:
        found = tuple(new.shape) if isinstance(new, torch.Tensor) else type(new).__name__
        raise StudyError(f"the edit of site {site!r} returns {found}, not a tensor of shape {tuple(old.shape)}")
    return new.to(old)


def template(site: str) -> str:
    """The name under which a site is listed: its position, if it has one, written as P."""
    name, at, _ = site.partition("@")
    return name + "@P" if at else name


def position_of(site: str) -> int | None:
    """The position in a site's name, None if it names none. Raises ValueError if it is not an integer."""
    _, at, position = site.partition("@")
    return int(position) if at else None
