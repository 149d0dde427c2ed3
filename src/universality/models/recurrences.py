"""The state of Mamba and Mamba-2 opened up: read and edited at any position, and as the sum of what was written to it.

Sites of layer L, besides those of the family:
    mamba.L.state@P    [B, *state]     the state after position P; an edit changes what P and all later positions read
    mamba.L.writes@P   [B, P, *state]  what each position up to P wrote that is left in the state at P. Their sum is the
                                       state, unless an edit of an earlier state put something else in; an edit of the
                                       writes changes the state by the change of their sum
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from universality.kernels.head_scan import chunked_scan, running_sum
from universality.kernels.selective_scan import selective_scan
from universality.models.taps import Taps


@dataclass(frozen=True)
class Recurrence(ABC):
    """What both kinds of state-space layer have in common, over all positions of a run."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor

    kernel: ClassVar[Callable]
    """(u, delta, A, B, C, D, state before) -> (output, state after)."""

    @property
    def length(self) -> int:
        return self.u.shape[1]

    def scan(self, start: int, stop: int, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of positions start to stop from the state before them (None: zeros), and the state after them."""
        u, delta, B, C = (x[:, start:stop] for x in (self.u, self.delta, self.B, self.C))
        return type(self).kernel(u, delta, self.A, B, C, self.D, state)

    @abstractmethod
    def read(self, state: torch.Tensor, position: int) -> torch.Tensor:
        """What `position` puts out when the state after it is `state`."""

    @abstractmethod
    def write(self) -> torch.Tensor:
        """What each position writes, not decayed: [B, L, *state]."""

    @abstractmethod
    def shrink(self, delta: torch.Tensor) -> torch.Tensor:
        """The factor by which a state falls in steps that sum to `delta` [..., *step]: [..., *state], or 1 for an axis
        that all share."""

    def decay(self, position: torch.Tensor) -> torch.Tensor:
        """What is left of each position's write in the state after `position` [B]: [B, L, *state], 0 for later ones."""
        since, reached = _since(self.delta, position)
        shrunk = self.shrink(since)
        return shrunk * reached.reshape(*reached.shape, *[1] * (shrunk.ndim - 2))

    def at(self, places: torch.Tensor) -> "Recurrence":
        """The inputs of each sequence at `places` [B, P] alone, for what these positions write."""
        rows = torch.arange(len(places), device=places.device)[:, None]
        u, delta, B, C = (x[rows, places] for x in (self.u, self.delta, self.B, self.C))
        return replace(self, u=u, delta=delta, B=B, C=C)

    def decay_at(self, places: torch.Tensor) -> torch.Tensor:
        """What is left of the writes at `places` [B, P] in the last state, without the [B, L, *state] of `decay`."""
        rows = torch.arange(len(places), device=places.device)[:, None]
        last = torch.full((len(places),), self.length - 1, device=places.device)
        return self.shrink(_since(self.delta, last)[0][rows, places])


class SelectiveRecurrence(Recurrence):
    """Mamba: u, delta [B, L, E]; A [E, N]; B, C [B, L, N]; D [E]; state [B, E, N]."""

    kernel = selective_scan

    def read(self, state, position):
        return torch.einsum("ben,bn->be", state, self.C[:, position]) + self.D * self.u[:, position]

    def write(self):
        return (self.delta * self.u)[..., None] * self.B[:, :, None, :]

    def shrink(self, delta):
        return torch.exp(delta[..., None] * self.A)


class HeadRecurrence(Recurrence):
    """Mamba-2: u [B, L, H, P]; delta [B, L, H]; A, D [H]; B, C [B, L, G, N]; state [B, H, P, N]."""

    kernel = chunked_scan

    def read(self, state, position):
        C = self.C[:, position].repeat_interleave(self.u.shape[2] // self.C.shape[2], 1)
        return torch.einsum("bhpn,bhn->bhp", state, C) + self.D[:, None] * self.u[:, position]

    def write(self):
        B = self.B.repeat_interleave(self.u.shape[2] // self.B.shape[2], 2)
        return (self.delta[..., None] * self.u)[..., None] * B[..., None, :]

    def shrink(self, delta):
        return torch.exp(delta * self.A)[..., None, None]


def _since(delta: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of delta [B, L, ...] over the positions after each one up to `position` [B]; and which are not after it."""
    place = torch.arange(delta.shape[1], device=delta.device)[None, :]
    reached = place <= position[:, None]
    inside = delta * reached.reshape(*reached.shape, *[1] * (delta.ndim - 2))
    return running_sum(inside.flip(1), 1).flip(1) - inside, reached


def scan_with_taps(recurrence: Recurrence, name: str, taps: Taps) -> torch.Tensor:
    """The output of all positions, its state tapped at the positions that a run asks for."""
    start, state, parts = 0, None, []
    for position, sites in taps.positions(f"{name}.state", f"{name}.writes").items():
        part, state = recurrence.scan(start, position + 1, state)
        tapped = state
        for site in sorted(sites, reverse=True):  # writes before the state that they make up
            tapped = _tap(recurrence, site, tapped, position, taps)
        if tapped is not state:
            part = torch.cat([part[:, :-1], recurrence.read(tapped, position)[:, None]], 1)
        start, state = position + 1, tapped
        parts.append(part)
    if start < recurrence.length:
        parts.append(recurrence.scan(start, recurrence.length, state)[0])
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _tap(recurrence: Recurrence, site: str, state: torch.Tensor, position: int, taps: Taps) -> torch.Tensor:
    if site.split("@")[0].endswith(".state"):
        return taps(site, state)
    at = torch.full((len(state),), position, device=state.device)
    writes = (recurrence.write() * recurrence.decay(at))[:, : position + 1]
    tapped = taps(site, writes)
    return state if tapped is writes else state + (tapped - writes).sum(1)
