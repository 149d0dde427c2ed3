"""Padding on either side. All families are causal, so tokens after a row's real ones change nothing before them:
padding on the right needs no mask, and padding on the left is rolled to the right before the run and back after it."""

import torch

from universality.errors import StudyError
from universality.models.taps import Shape


def first_positions(mask: torch.Tensor) -> torch.Tensor:
    """Where each row's real tokens begin [B]; `mask` [B, L] is true at real tokens.

    Raises StudyError unless each row's real tokens are one stretch, at the left or the right end.
    """
    mask = mask.bool()
    first, count = mask.int().argmax(1), mask.sum(1)
    place = torch.arange(mask.shape[1], device=mask.device)
    one_stretch = (place >= first[:, None]) & (place < (first + count)[:, None])
    at_an_end = (first == 0) | (first + count == mask.shape[1])
    bad = ~((mask == one_stretch).all(1) & at_an_end & (count > 0))
    if bad.any():
        row = int(bad.int().argmax())
        raise StudyError(f"mask: row {row} must hold real tokens in one stretch at the left or the right end")
    return first


def roll_rows(value: torch.Tensor, by: torch.Tensor, axes: list[int]) -> torch.Tensor:
    """Roll each row b of value [B, ...] towards lower positions by `by`[b] along `axes`."""
    for axis in axes:
        length = value.shape[axis]
        place = (torch.arange(length, device=value.device)[None] + by[:, None]) % length
        shape = [1] * value.ndim
        shape[0], shape[axis] = value.shape[0], length
        value = value.gather(axis, place.reshape(shape).expand_as(value))
    return value


def position_axes(shape: Shape) -> list[int]:
    return [axis for axis, size in enumerate(shape) if size == "L"]
