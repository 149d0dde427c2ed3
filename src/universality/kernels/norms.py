"""RMS normalisation (Zhang & Sennrich 2019, arXiv 1910.07467) in one pass over each row, without gradients:

out = weight * x / sqrt(mean of x^2 over its group + eps)
"""

import numba
import numpy as np
import torch

from universality.kernels.arrays import as_array, as_kernel_array, as_tensor, empty_array
from universality.kernels.compiled import njit
from universality.kernels.elementary import FASTMATH, f32, load, rounded

_BLOCK = 64  # partial sums, added up at the end: lanes of the vectors


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy")
def _rms_norm(x, weight, eps, group, out):
    """x, out [rows, width]; the width is whole groups."""
    n_rows, width = x.shape
    for row in numba.prange(n_rows):
        partial = np.zeros(_BLOCK, dtype=np.float32)
        for g0 in range(0, width, group):
            x_row, weight_row, out_row = x[row, g0 : g0 + group], weight[g0 : g0 + group], out[row, g0 : g0 + group]
            partial[:] = f32(0.0)
            whole = group - group % _BLOCK
            for e0 in range(0, whole, _BLOCK):
                block = x_row[e0 : e0 + _BLOCK]
                for e in range(_BLOCK):
                    value = load(block[e])
                    partial[e] += value * value
            total = f32(0.0)
            for e in range(_BLOCK):
                total += partial[e]
            for e in range(whole, group):
                value = load(x_row[e])
                total += value * value
            scale = f32(1.0) / np.sqrt(total / f32(group) + eps)
            for e in range(group):
                out_row[e] = rounded(out, weight_row[e] * (load(x_row[e]) * scale))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, group: int = 0) -> torch.Tensor:
    """x [..., width] normed over groups of `group` neighbours (0: the whole width), in `dtype`; on the CPU."""
    rows = as_kernel_array(x.reshape(-1, x.shape[-1]))
    out = empty_array(rows.shape, dtype)
    _rms_norm(rows, as_array(weight), f32(eps), group or rows.shape[1], out)
    return as_tensor(out).view(x.shape)
