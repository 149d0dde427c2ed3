"""The short causal depthwise convolution of Mamba with its SiLU:

    out[b, t, e] = silu(bias[e] + sum_k weight[e, k] * x[b, t - (K - 1) + k, e])        x zero before t = 0

`causal_conv_silu_reference` is torch's own conv1d; `causal_conv_silu` the fused CPU kernel (forward and backward, no
transposes), which keeps only its input for the backward pass. Shapes: x [B, L, E], weight [E, K], bias [E].
"""

import numba
import numpy as np
import torch
import torch.nn.functional as F

from universality.models.arrays import as_array


def causal_conv_silu_reference(x, weight, bias):
    taps = weight.shape[1]
    mixed = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=taps - 1, groups=weight.shape[0])
    return F.silu(mixed[..., : x.shape[1]]).transpose(1, 2)


@numba.njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
def _pre_activation(x, weight_t, bias, out):
    n_batch, n_pos, n_chan = x.shape
    taps = weight_t.shape[0]
    for b in numba.prange(n_batch):
        for t in range(n_pos):
            for e in range(n_chan):
                out[b, t, e] = bias[e]
            for k in range(max(0, taps - 1 - t), taps):
                s = t - (taps - 1) + k
                for e in range(n_chan):
                    out[b, t, e] += weight_t[k, e] * x[b, s, e]


@numba.njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
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
        _pre_activation(x_np, weight_t, bias_np, pre)
        ctx.arrays = (x_np, weight_t, pre)
        ctx.dtype = x.dtype
        return F.silu(torch.from_numpy(pre)).to(x.dtype)

    @staticmethod
    def backward(ctx, dout):
        x, weight_t, pre = ctx.arrays
        dpre = torch.ops.aten.silu_backward(dout.float().contiguous(), torch.from_numpy(pre)).numpy()
        dx = np.zeros_like(x)
        dweight_t = np.zeros((x.shape[0], *weight_t.shape), dtype=np.float32)
        dbias = np.zeros((x.shape[0], x.shape[2]), dtype=np.float32)
        _backward(x, weight_t, dpre, dx, dweight_t, dbias)
        dweight = torch.from_numpy(np.ascontiguousarray(dweight_t.sum(0).T))
        return torch.from_numpy(dx).to(ctx.dtype), dweight, torch.from_numpy(dbias.sum(0))


def causal_conv_silu(x, weight, bias):
    """Fused on the CPU, differentiable; returns [B, L, E] in x's dtype."""
    return _CausalConvSilu.apply(x, weight, bias)
