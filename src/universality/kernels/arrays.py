"""Tensors as the kernels take them: contiguous float32 arrays, or uint16 arrays that hold the bits of bfloat16."""

from collections.abc import Sequence

import numpy as np
import torch


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's values as a contiguous float32 array, without a copy where it is one already."""
    return np.ascontiguousarray(tensor.detach().to(torch.float32).numpy())


def as_kernel_array(tensor: torch.Tensor) -> np.ndarray:
    """Like `as_array`, but bfloat16 is handed over as it is: uint16, the same bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().contiguous().view(torch.uint16).numpy()
    return as_array(tensor)


def empty_array(shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    """An array for a kernel to fill with values of `dtype`: float32, or bfloat16 as uint16."""
    return np.empty(shape, dtype=np.uint16 if dtype == torch.bfloat16 else np.float32)


def output_array(shape: tuple[int, ...], out: torch.Tensor | None) -> np.ndarray:
    """A float32 array for a kernel to fill: the memory of `out`, or a new one.

    Raises ValueError for an `out` that would not hold it.
    """
    if out is None:
        return np.empty(shape, dtype=np.float32)
    if out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out: is {tuple(out.shape)}, {out.dtype}; must be contiguous float32 of {tuple(shape)}")
    return out.numpy()


def as_rows(array: np.ndarray) -> np.ndarray:
    """A contiguous array's positions in one row, [B, L, ...] as [B * L, ...]: the same memory."""
    return array.reshape(-1, array.shape[-1])


def row_starts(shape: Sequence[int], cu_seqlens: torch.Tensor | None) -> np.ndarray:
    """Which rows begin a sequence, and where the last one ends, int64 [B + 1].

    Of values of `shape` [B, L, ...], or [R, ...] with sequences of any lengths, 0 among them, one after the other at
    `cu_seqlens` (as flash-attn has it). Raises ValueError for others than those, which kernels would read beyond.
    """
    axes = 3 if cu_seqlens is None else 2
    if len(shape) != axes:
        raise ValueError(f"values of shape {tuple(shape)}: must have {axes} axes, 2 with cu_seqlens and 3 without")
    if cu_seqlens is None:
        return np.arange(shape[0] + 1) * shape[1]
    starts = cu_seqlens.numpy().astype(np.int64)
    if len(starts) < 1 or starts[0] != 0 or starts[-1] != shape[0] or (np.diff(starts) < 0).any():
        raise ValueError(f"cu_seqlens: is {starts.tolist()}; must rise from 0 to the {shape[0]} rows")
    return starts


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A kernel's array as a tensor of the same memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
