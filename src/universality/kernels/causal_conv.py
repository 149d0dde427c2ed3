"""The short causal depthwise convolution of Mamba with its SiLU:

    out[b, t, e] = silu(bias[e] + sum_k weight[e, k] * x[b, t - (K - 1) + k, e])        x zero before t = 0, or given

`causal_conv_silu_reference` is torch's own conv1d; `causal_conv_silu` the fused CPU kernel (forward and backward, no
transposes), which keeps only its input for the backward pass. Shapes: x [B, L, E], weight [E, K], bias [E].
"""

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from universality.kernels.arrays import as_array, as_kernel_array, as_rows, row_starts
from universality.kernels.compiled import njit
from universality.kernels.elementary import FASTMATH, load, silu

_BLOCK = 64  # channels at a time
_ROWS = 32  # positions per task
_NOTHING_BEFORE = np.empty((0, 0, 0), dtype=np.float32)


def causal_conv_silu_reference(x, weight, bias):
    """Differentiated by autograd, any dtype."""
    return F.silu(conv_taps(x, weight).sum(2) + bias)


def conv_taps(x, weight):
    """What each tap of the convolution adds, weight[e, k] * x[b, t - (K - 1) + k, e]: [B, L, K, E]."""
    taps, length = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    return torch.stack([padded[:, k : k + length] * weight[:, k] for k in range(taps)], dim=2)


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy")
def _forward(x, starts, first_channel, before, weight_t, bias, out, activate):
    """Channels of x [R, C] from `first_channel` on -> out [R, E], through SiLU if `activate`.

    starts [B + 1]: which rows begin a sequence, and R. before [B, K - 1, E] (or empty: zeros) is what these channels
    were just before.
    """
    n_batch, n_chan = len(starts) - 1, out.shape[1]
    taps = weight_t.shape[0]
    longest = 0
    for b in range(n_batch):
        longest = max(longest, starts[b + 1] - starts[b])
    n_blocks = (longest + _ROWS - 1) // _ROWS
    for task in numba.prange(n_batch * n_blocks):
        b, first = task // n_blocks, (task % n_blocks) * _ROWS
        row, n_pos = starts[b], starts[b + 1] - starts[b]
        total = np.zeros(_BLOCK, dtype=np.float32)
        for t in range(first, min(first + _ROWS, n_pos)):
            for e0 in range(0, n_chan, _BLOCK):
                e1 = min(e0 + _BLOCK, n_chan)
                width = e1 - e0
                total[:width] = bias[e0:e1]
                if before.shape[0] > 0:
                    for k in range(taps - 1 - t):
                        weight_row, before_row = weight_t[k, e0:e1], before[b, t + k, e0:e1]
                        for e in range(width):
                            total[e] += weight_row[e] * before_row[e]
                for k in range(max(0, taps - 1 - t), taps):
                    weight_row, x_row = (
                        weight_t[k, e0:e1],
                        x[row + t - (taps - 1) + k, first_channel + e0 : first_channel + e1],
                    )
                    for e in range(width):
                        total[e] += weight_row[e] * load(x_row[e])
                out_row = out[row + t, e0:e1]
                if activate:
                    for e in range(width):
                        out_row[e] = silu(total[e])
                else:
                    for e in range(width):
                        out_row[e] = total[e]


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy")
def _backward(x, weight_t, dpre, dx, dweight_t, dbias):
    """dweight_t [B, K, E] and dbias [B, E] are per sequence, so that their sums have one order."""
    n_batch, n_pos, n_chan = x.shape
    taps = weight_t.shape[0]
    for b in numba.prange(n_batch):
        for t in range(n_pos):
            for e in range(n_chan):
                dbias[b, e] += dpre[b, t, e]
            for k in range(max(0, taps - 1 - t), taps):
                s = t - (taps - 1) + k
                for e in range(n_chan):
                    dx[b, s, e] += weight_t[k, e] * dpre[b, t, e]
                    dweight_t[b, k, e] += x[b, s, e] * dpre[b, t, e]


class _CausalConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        x_np, weight_t, bias_np = as_array(x), as_array(weight.T), as_array(bias)
        pre = np.empty_like(x_np)
        starts = row_starts(x.shape, None)
        _forward(as_rows(x_np), starts, 0, _NOTHING_BEFORE, weight_t, bias_np, as_rows(pre), False)
        ctx.save_for_backward(x, weight)
        ctx.pre = pre
        return F.silu(torch.from_numpy(pre)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        inputs, weight = ctx.saved_tensors
        x, weight_t, pre = as_array(inputs), as_array(weight.T), ctx.pre
        dpre = torch.ops.aten.silu_backward(dout.float().contiguous(), torch.from_numpy(pre)).numpy()
        dx = np.zeros_like(x)
        dweight_t = np.zeros((x.shape[0], *weight_t.shape), dtype=np.float32)
        dbias = np.zeros((x.shape[0], x.shape[2]), dtype=np.float32)
        _backward(x, weight_t, dpre, dx, dweight_t, dbias)
        dweight = torch.from_numpy(np.ascontiguousarray(dweight_t.sum(0).T))
        return torch.from_numpy(dx).to(inputs.dtype), dweight, torch.from_numpy(dbias.sum(0))


def causal_conv_silu(x, weight, bias):
    """Fused and differentiable: ours on the CPU, causal-conv1d's on a GPU. Returns [B, L, E] in x's dtype."""
    if x.device.type == "cuda":
        return _on_cuda(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _CausalConvSilu.apply(x, weight, bias)
    return causal_conv_silu_of(x, 0, weight, bias).to(x.dtype)


def causal_conv_silu_of(x, first_channel, weight, bias, before=None, cu_seqlens=None):
    """Of the channels of x [B, L, C] from `first_channel` on, without gradients: [B, L, E] in float32.

    `before` [B, K - 1, E], float32, is what these channels were just before (None: zeros). With `cu_seqlens` x is
    [R, C], see `row_starts`. Raises ValueError for another shape, which the kernel would read beyond.
    """
    starts = row_starts(x.shape, cu_seqlens)
    expected = (len(starts) - 1, weight.shape[1] - 1, len(weight))
    if before is not None and before.shape != expected:
        raise ValueError(f"before has shape {tuple(before.shape)}, the convolution needs {expected}")
    out = np.empty((*x.shape[:-1], weight.shape[0]), dtype=np.float32)
    given = _NOTHING_BEFORE if before is None else as_array(before)
    rows = as_rows(as_kernel_array(x))
    _forward(rows, starts, first_channel, given, as_array(weight.T), as_array(bias), as_rows(out), True)
    return torch.from_numpy(out)


def _on_cuda(x, weight, bias):
    """causal-conv1d's kernel, which takes [B, E, L]; torch's own convolution where it is not installed."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return causal_conv_silu_reference(x, weight.to(x.dtype), bias.to(x.dtype))
    out = causal_conv1d_fn(x.transpose(1, 2), weight.to(x.dtype), bias.to(x.dtype), activation="silu")
    return out.transpose(1, 2)
