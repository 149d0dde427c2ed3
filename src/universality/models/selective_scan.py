"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, equations 2a-2b with zero-order hold):

    h_t = exp(delta_t * A) * h_{t-1} + (delta_t * u_t) * B_t        state   [B, E, N]
    y_t = sum_n C_t[n] * h_t[:, n] + D * u_t                        output  [B, L, E]

Two implementations, tested equal:

* `selective_scan_reference`: the plain recurrence in torch, any dtype, differentiated by autograd.
* `selective_scan`: fused CPU kernels. Vectors run along E, so B_t[n] and C_t[n] are scalars and nothing is summed
  across lanes in the forward pass; a block of `_BLOCK` channels keeps its state in the first-level cache. The forward
  pass stores the state only every `_CHUNK` positions; the backward pass recomputes a chunk at a time. Sums over
  positions and channels are taken in a fixed order, so the bytes do not depend on the number of threads.

Shapes: u, delta [B, L, E]; A [E, N]; B, C [B, L, N]; D [E]; initial_state, last state [B, E, N]. delta is already
positive (after softplus), A negative.
"""

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from universality.models.arrays import as_array

_BLOCK = 64  # channels per task
_CHUNK = 64  # positions between stored states

f32 = np.float32


def selective_scan_reference(u, delta, A, B, C, D, initial_state=None):
    """The plain recurrence. Returns (y [B, L, E], every state [B, L, E, N])."""
    decay = torch.exp(delta[..., None] * A)
    write = (delta * u)[..., None] * B[:, :, None, :]
    state = torch.zeros_like(write[:, 0]) if initial_state is None else initial_state
    states = []
    for t in range(u.shape[1]):
        state = decay[:, t] * state + write[:, t]
        states.append(state)
    states = torch.stack(states, dim=1)
    y = torch.einsum("blen,bln->ble", states, C) + D * u
    return y, states


@intrinsic
def _float_from_bits(typingctx, bits):
    """Read an int32 as the float32 of the same bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@numba.njit(inline="always", fastmath=True)
def _exp_nonpositive(x):
    """exp(x) for x <= 0 in float32, branch-free so that loops vectorise; relative error below 3e-7."""
    t = max(x, f32(-87.0)) * f32(1.4426950408889634)
    i = np.int32(t - f32(0.5))  # truncation towards zero: the nearest integer of a non-positive t
    r = (t - f32(i)) * f32(0.6931471805599453)
    p = f32(1.0 / 720.0)
    p = p * r + f32(1.0 / 120.0)
    p = p * r + f32(1.0 / 24.0)
    p = p * r + f32(1.0 / 6.0)
    p = p * r + f32(0.5)
    p = p * r + f32(1.0)
    p = p * r + f32(1.0)
    return p * _float_from_bits((i + np.int32(127)) << np.int32(23))


@numba.njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
def _forward(u, delta, A_t, B, C, D, state, y, stored):
    """state [B, N, E] holds h_0 and ends as h_L; stored [B, ceil(L / _CHUNK), N, E] gets h before each chunk."""
    n_batch, n_pos, n_chan = u.shape
    n_state = A_t.shape[0]
    n_blocks = (n_chan + _BLOCK - 1) // _BLOCK
    for task in numba.prange(n_batch * n_blocks):
        b = task // n_blocks
        e0 = (task % n_blocks) * _BLOCK
        width = min(_BLOCK, n_chan - e0)
        h = np.zeros((n_state, _BLOCK), dtype=np.float32)
        a = np.zeros((n_state, _BLOCK), dtype=np.float32)
        d = np.zeros(_BLOCK, dtype=np.float32)
        w = np.zeros(_BLOCK, dtype=np.float32)
        out = np.zeros(_BLOCK, dtype=np.float32)
        for n in range(n_state):
            for e in range(width):
                h[n, e] = state[b, n, e0 + e]
                a[n, e] = A_t[n, e0 + e]
        for t in range(n_pos):
            if t % _CHUNK == 0:
                for n in range(n_state):
                    for e in range(width):
                        stored[b, t // _CHUNK, n, e0 + e] = h[n, e]
            for e in range(width):
                d[e] = delta[b, t, e0 + e]
                w[e] = d[e] * u[b, t, e0 + e]
                out[e] = D[e0 + e] * u[b, t, e0 + e]
            for n in range(n_state):
                bn = B[b, t, n]
                cn = C[b, t, n]
                for e in range(_BLOCK):
                    s = _exp_nonpositive(d[e] * a[n, e]) * h[n, e] + w[e] * bn
                    h[n, e] = s
                    out[e] += s * cn
            for e in range(width):
                y[b, t, e0 + e] = out[e]
        for n in range(n_state):
            for e in range(width):
                state[b, n, e0 + e] = h[n, e]


@numba.njit(inline="always", fastmath=True)
def _recompute(u, delta, a, B, b, e0, width, first, last, before, history, decays):
    """Fill history [t + 1, N, _BLOCK] and decays [t, N, _BLOCK] for first <= t < last from the stored state."""
    n_state = a.shape[0]
    for n in range(n_state):
        for e in range(width):
            history[0, n, e] = before[b, first // _CHUNK, n, e0 + e]
    d = np.zeros(_BLOCK, dtype=np.float32)
    w = np.zeros(_BLOCK, dtype=np.float32)
    for t in range(first, last):
        for e in range(width):
            d[e] = delta[b, t, e0 + e]
            w[e] = d[e] * u[b, t, e0 + e]
        for n in range(n_state):
            bn = B[b, t, n]
            for e in range(_BLOCK):
                decay = _exp_nonpositive(d[e] * a[n, e])
                decays[t - first, n, e] = decay
                history[t - first + 1, n, e] = decay * history[t - first, n, e] + w[e] * bn


@numba.njit(inline="always", fastmath=True)
def _backward_chunk(
    u, delta, a, B, C, D, dy, b, e0, width, first, last, history, decays, g, da, du, ddelta, dB, dC, dD
):
    """From the last position to the first: g [N, _BLOCK], the gradient of the state, is carried and updated."""
    d = np.zeros(_BLOCK, dtype=np.float32)
    x = np.zeros(_BLOCK, dtype=np.float32)
    dout = np.zeros(_BLOCK, dtype=np.float32)
    dwrite = np.zeros(_BLOCK, dtype=np.float32)
    dd = np.zeros(_BLOCK, dtype=np.float32)
    for t in range(last - 1, first - 1, -1):
        for e in range(width):
            d[e] = delta[b, t, e0 + e]
            x[e] = u[b, t, e0 + e]
            dout[e] = dy[b, t, e0 + e]
        dwrite[:] = 0.0
        dd[:] = 0.0
        for n in range(a.shape[0]):
            bn = B[b, t, n]
            cn = C[b, t, n]
            sum_b = f32(0.0)
            sum_c = f32(0.0)
            for e in range(_BLOCK):
                gs = g[n, e] + dout[e] * cn
                decay = decays[t - first, n, e]
                sum_c += dout[e] * history[t - first + 1, n, e]
                sum_b += gs * (d[e] * x[e])
                dwrite[e] += gs * bn
                gah = gs * decay * history[t - first, n, e]
                dd[e] += gah * a[n, e]
                da[n, e] += gah * d[e]
                g[n, e] = gs * decay
            dB[b, t, n] += sum_b
            dC[b, t, n] += sum_c
        for e in range(width):
            du[b, t, e0 + e] = dwrite[e] * d[e] + dout[e] * D[e0 + e]
            ddelta[b, t, e0 + e] = dd[e] + dwrite[e] * x[e]
            dD[b, e0 + e] += dout[e] * x[e]


@numba.njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
def _backward(u, delta, A_t, B, C, D, stored, dy, dstate, du, ddelta, dA_t, dB, dC, dD):
    """dstate [B, N, E] holds the gradient of h_L, ends as that of h_0. dA_t [B, N, E], dD [B, E] are per sequence."""
    n_batch, n_pos, n_chan = u.shape
    n_state = A_t.shape[0]
    for b in numba.prange(n_batch):
        history = np.zeros((_CHUNK + 1, n_state, _BLOCK), dtype=np.float32)
        decays = np.zeros((_CHUNK, n_state, _BLOCK), dtype=np.float32)
        g = np.zeros((n_state, _BLOCK), dtype=np.float32)
        a = np.zeros((n_state, _BLOCK), dtype=np.float32)
        da = np.zeros((n_state, _BLOCK), dtype=np.float32)
        for block in range((n_chan + _BLOCK - 1) // _BLOCK):
            e0 = block * _BLOCK
            width = min(_BLOCK, n_chan - e0)
            da[:] = 0.0
            a[:] = 0.0
            g[:] = 0.0
            for n in range(n_state):
                for e in range(width):
                    a[n, e] = A_t[n, e0 + e]
                    g[n, e] = dstate[b, n, e0 + e]
            for first in range(((n_pos - 1) // _CHUNK) * _CHUNK, -1, -_CHUNK):
                last = min(first + _CHUNK, n_pos)
                _recompute(u, delta, a, B, b, e0, width, first, last, stored, history, decays)
                _backward_chunk(
                    u, delta, a, B, C, D, dy, b, e0, width, first, last, history, decays, g, da, du, ddelta, dB, dC, dD
                )
            for n in range(n_state):
                for e in range(width):
                    dA_t[b, n, e0 + e] = da[n, e]
                    dstate[b, n, e0 + e] = g[n, e]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, initial_state):
        n_batch, n_pos, n_chan = u.shape
        n_state = A.shape[1]
        arrays = [as_array(u), as_array(delta), as_array(A.T), as_array(B), as_array(C), as_array(D)]
        if initial_state is None:
            state = np.zeros((n_batch, n_state, n_chan), dtype=np.float32)
        else:
            state = as_array(initial_state.transpose(1, 2)).copy()
        y = np.empty((n_batch, n_pos, n_chan), dtype=np.float32)
        stored = np.empty((n_batch, -(-n_pos // _CHUNK), n_state, n_chan), dtype=np.float32)
        _forward(*arrays, state, y, stored)
        ctx.arrays = (*arrays, stored)
        ctx.dtypes = [t.dtype for t in (u, delta, A, B, C, D)]
        ctx.has_initial_state = initial_state is not None
        return torch.from_numpy(y).to(u.dtype), torch.from_numpy(state).transpose(1, 2)

    @staticmethod
    def backward(ctx, dy, dlast):
        *arrays, stored = ctx.arrays
        u, _, A_t, B, _, D = arrays
        dstate = as_array(dlast.transpose(1, 2)).copy()
        du, ddelta = np.empty_like(u), np.empty_like(u)
        dA_t = np.zeros((u.shape[0], *A_t.shape), dtype=np.float32)
        dB, dC = np.zeros_like(B), np.zeros_like(B)
        dD = np.zeros((u.shape[0], D.shape[0]), dtype=np.float32)
        _backward(*arrays, stored, as_array(dy), dstate, du, ddelta, dA_t, dB, dC, dD)
        grads = [du, ddelta, dA_t.sum(0).T, dB, dC, dD.sum(0)]
        grads = [torch.from_numpy(np.ascontiguousarray(g)).to(t) for g, t in zip(grads, ctx.dtypes, strict=True)]
        initial = torch.from_numpy(dstate).transpose(1, 2) if ctx.has_initial_state else None
        return (*grads, initial)


def selective_scan(u, delta, A, B, C, D, initial_state=None):
    """Fused scan on the CPU, differentiable. Returns (y [B, L, E] in u's dtype, last state [B, E, N] in float32)."""
    return _SelectiveScan.apply(u, delta, A, B, C, D, initial_state)
