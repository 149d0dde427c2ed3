"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, equations 2a-2b with zero-order hold):

    h_t = exp(delta_t * A) * h_{t-1} + (delta_t * u_t) * B_t        state   [B, E, N]
    y_t = sum_n C_t[n] * h_t[:, n] + D * u_t                        output  [B, L, E]

Implementations, tested equal:

* `selective_scan_reference`: the plain recurrence in torch, any dtype, differentiated by autograd.
* `selective_scan`: fused kernels, differentiable: ours on the CPU, those of mamba-ssm on a GPU.
* `gated_scan`: the same without gradients, with what Mamba does just before and after it: softplus of the step size and
  the gate, y * silu(z).

On the CPU vectors run along E, so B_t[n] and C_t[n] are scalars and nothing is summed across lanes in the forward pass;
a block of `_BLOCK` channels keeps its state in the first-level cache. The forward pass stores the state only every
`_CHUNK` positions; the backward pass recomputes a chunk at a time. Sums over positions and channels are taken in a
fixed order, so the bytes do not depend on the number of threads. The state is float32 whatever the inputs are.

Shapes: u, delta [B, L, E]; A [E, N]; B, C [B, L, N]; D [E]; initial_state, last state [B, E, N]. delta is already
positive (after softplus), A negative.
"""

import numba
import numpy as np
import torch
from torch.autograd.function import once_differentiable

from universality.kernels.arrays import (
    as_array,
    as_kernel_array,
    as_rows,
    as_tensor,
    empty_array,
    output_array,
    row_starts,
)
from universality.kernels.compiled import njit
from universality.kernels.elementary import (
    FASTMATH,
    LN2,
    LOG2E,
    exp2_nonpositive,
    f32,
    load,
    rounded,
    silu,
    softplus,
)

_BLOCK = 64  # channels per task
_CHUNK = 64  # positions between stored states
_NO_BIAS = np.empty(0, dtype=np.float32)
_NO_GATE = np.empty((0, 0), dtype=np.float32)
_NOT_STORED = np.empty((0, 0, 0, 0), dtype=np.float32)


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


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy")
def _forward(starts, u, delta, delta_bias, A_t, B, C, D, gate, gate_offset, state, y, stored):
    """u, delta, y [R, E]; B, C [R, N]; starts [B + 1]: which rows begin a sequence, and R. state [B, N, E] holds h_0
    and ends as h_L.

    A_t [N, E] is A * log2(e). With delta_bias [E] (else empty), delta is before softplus and bias. With gate (else
    empty) y is times silu(gate[:, gate_offset + e]). stored [B, ceil(L / _CHUNK), N, E] (or empty) gets h before
    each chunk.
    """
    n_batch, n_chan = len(starts) - 1, u.shape[1]
    n_state = A_t.shape[0]
    n_blocks = (n_chan + _BLOCK - 1) // _BLOCK
    for task in numba.prange(n_batch * n_blocks):
        b = task // n_blocks
        row, n_pos = starts[b], starts[b + 1] - starts[b]
        e0 = (task % n_blocks) * _BLOCK
        e1 = min(e0 + _BLOCK, n_chan)
        width = e1 - e0
        h = np.zeros((n_state, _BLOCK), dtype=np.float32)
        a = np.zeros((n_state, _BLOCK), dtype=np.float32)
        d = np.zeros(_BLOCK, dtype=np.float32)
        w = np.zeros(_BLOCK, dtype=np.float32)
        out = np.zeros(_BLOCK, dtype=np.float32)
        h[:, :width] = state[b, :, e0:e1]
        a[:, :width] = A_t[:, e0:e1]
        skip = D[e0:e1]
        for t in range(n_pos):
            # Rows are sliced first: an index that could be negative would keep the loops from becoming vectors.
            delta_row, u_row, y_row = delta[row + t, e0:e1], u[row + t, e0:e1], y[row + t, e0:e1]
            if t % _CHUNK == 0 and stored.shape[0] > 0:
                stored[b, t // _CHUNK, :, e0:e1] = h[:, :width]
            if delta_bias.shape[0] > 0:
                bias = delta_bias[e0:e1]
                for e in range(width):
                    d[e] = softplus(load(delta_row[e]) + bias[e])
            else:
                for e in range(width):
                    d[e] = load(delta_row[e])
            for e in range(width):
                x = load(u_row[e])
                w[e] = d[e] * x
                out[e] = skip[e] * x
            for n in range(n_state):
                bn = B[row + t, n]
                cn = C[row + t, n]
                for e in range(_BLOCK):
                    s = exp2_nonpositive(d[e] * a[n, e]) * h[n, e] + w[e] * bn
                    h[n, e] = s
                    out[e] += s * cn
            if gate.shape[0] > 0:
                gate_row = gate[row + t, gate_offset + e0 : gate_offset + e1]
                for e in range(width):
                    y_row[e] = rounded(y, out[e] * silu(load(gate_row[e])))
            else:
                for e in range(width):
                    y_row[e] = rounded(y, out[e])
        state[b, :, e0:e1] = h[:, :width]


@numba.njit(inline="always", fastmath=FASTMATH)
def _recompute(u, delta, a, B, b, e0, width, first, last, before, history, decays):
    """Fill history [t + 1, N, _BLOCK] and decays [t, N, _BLOCK] for first <= t < last from the stored state."""
    n_state = a.shape[0]
    history[0, :, :width] = before[b, first // _CHUNK, :, e0 : e0 + width]
    d = np.zeros(_BLOCK, dtype=np.float32)
    w = np.zeros(_BLOCK, dtype=np.float32)
    for t in range(first, last):
        delta_row, u_row = delta[b, t, e0 : e0 + width], u[b, t, e0 : e0 + width]
        for e in range(width):
            d[e] = delta_row[e]
            w[e] = d[e] * u_row[e]
        for n in range(n_state):
            bn = B[b, t, n]
            for e in range(_BLOCK):
                decay = exp2_nonpositive(d[e] * a[n, e])
                decays[t - first, n, e] = decay
                history[t - first + 1, n, e] = decay * history[t - first, n, e] + w[e] * bn


@numba.njit(inline="always", fastmath=FASTMATH)
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
        d[:width] = delta[b, t, e0 : e0 + width]
        x[:width] = u[b, t, e0 : e0 + width]
        dout[:width] = dy[b, t, e0 : e0 + width]
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
        du_row, ddelta_row = du[b, t, e0 : e0 + width], ddelta[b, t, e0 : e0 + width]
        skip, dskip = D[e0 : e0 + width], dD[b, e0 : e0 + width]
        for e in range(width):
            du_row[e] = dwrite[e] * d[e] + dout[e] * skip[e]
            ddelta_row[e] = dd[e] * LN2 + dwrite[e] * x[e]
            dskip[e] += dout[e] * x[e]


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy")
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
            a[:, :width] = A_t[:, e0 : e0 + width]
            g[:, :width] = dstate[b, :, e0 : e0 + width]
            for first in range(((n_pos - 1) // _CHUNK) * _CHUNK, -1, -_CHUNK):
                last = min(first + _CHUNK, n_pos)
                _recompute(u, delta, a, B, b, e0, width, first, last, stored, history, decays)
                _backward_chunk(
                    u, delta, a, B, C, D, dy, b, e0, width, first, last, history, decays, g, da, du, ddelta, dB, dC, dD
                )
            dA_t[b, :, e0 : e0 + width] = da[:, :width]
            dstate[b, :, e0 : e0 + width] = g[:, :width]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, initial_state):
        n_batch, n_pos, n_chan = u.shape
        u_np, delta_np, *parameters = _arrays(u, delta, A, B, C, D)
        state = _initial(initial_state, n_batch, A)
        y = empty_array((n_batch, n_pos, n_chan), u.dtype)
        stored = _NOT_STORED
        if any(ctx.needs_input_grad):
            stored = np.empty((n_batch, -(-n_pos // _CHUNK), A.shape[1], n_chan), dtype=np.float32)
        A_t, B_np, C_np, D_np = parameters
        _forward(
            row_starts(u.shape, None), as_rows(u_np), as_rows(delta_np), _NO_BIAS, A_t, as_rows(B_np), as_rows(C_np),
            D_np, _NO_GATE, 0, state, as_rows(y), stored,
        )  # fmt: skip
        ctx.save_for_backward(u, delta, A, B, C, D)
        ctx.stored = stored
        ctx.has_initial_state = initial_state is not None
        return as_tensor(y), torch.from_numpy(state).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        inputs = ctx.saved_tensors
        u, delta, A_t, B, C, D = _arrays(*inputs)
        dstate = as_array(dlast.transpose(1, 2)).copy()
        du, ddelta = np.empty_like(u), np.empty_like(u)
        dA_t = np.zeros((u.shape[0], *A_t.shape), dtype=np.float32)
        dB, dC = np.zeros_like(B), np.zeros_like(B)
        dD = np.zeros((u.shape[0], D.shape[0]), dtype=np.float32)
        _backward(u, delta, A_t, B, C, D, ctx.stored, as_array(dy), dstate, du, ddelta, dA_t, dB, dC, dD)
        grads = [du, ddelta, dA_t.sum(0).T, dB, dC, dD.sum(0)]
        grads = [torch.from_numpy(np.ascontiguousarray(g)).to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
        initial = torch.from_numpy(dstate).transpose(1, 2) if ctx.has_initial_state else None
        return (*grads, initial)


def _arrays(u, delta, A, B, C, D) -> list[np.ndarray]:
    """What the kernels take; raises ValueError for shapes that they would read beyond."""
    (*positions, n_chan), n_state = u.shape, A.shape[1]
    small = (*positions, n_state)
    if (delta.shape, A.shape, B.shape, C.shape, D.shape) != (u.shape, (n_chan, n_state), small, small, (n_chan,)):
        shapes = [tuple(x.shape) for x in (u, delta, A, B, C, D)]
        raise ValueError(f"shapes of u, delta, A, B, C, D do not fit each other: {shapes}")
    return [as_array(u), as_array(delta), _decay_rates(A), as_array(B), as_array(C), as_array(D)]


def _decay_rates(A: torch.Tensor) -> np.ndarray:
    return as_array(A.T) * LOG2E


def _initial(state: torch.Tensor | None, n_batch: int, A: torch.Tensor) -> np.ndarray:
    if state is None:
        return np.zeros((n_batch, A.shape[1], A.shape[0]), dtype=np.float32)
    return as_array(state.transpose(1, 2)).copy()


def selective_scan(u, delta, A, B, C, D, initial_state=None):
    """Fused and differentiable once. Returns (y [B, L, E], bfloat16 if u is and else float32; last state, float32)."""
    if u.device.type == "cuda":
        return _on_cuda(u, delta, A, B, C, D, initial_state)
    return _SelectiveScan.apply(u, delta, A, B, C, D, initial_state)


def gated_scan(u, step, step_bias, A, B, C, D, xz, initial_state=None, out=None, cu_seqlens=None):
    """Without gradients, in float32: (y * silu(z) [B, L, E], last state [B, E, N]).

    u, step [B, L, E]; step_bias [E]: delta is softplus(step + step_bias); z is the second half of xz [B, L, 2E],
    bfloat16 or float32. The first is written to `out`, contiguous float32, where that is given. With `cu_seqlens` the
    positions of all sequences are in one row, [R, ...] in place of [B, L, ...]: see `row_starts`.
    """
    if xz.shape != (*u.shape[:-1], 2 * u.shape[-1]):
        raise ValueError(f"xz has shape {tuple(xz.shape)}, which does not fit u of {tuple(u.shape)}")
    u_np, step_np, A_t, B_np, C_np, D_np = _arrays(u, step, A, B, C, D)
    starts, y = row_starts(u.shape, cu_seqlens), output_array(u.shape, out)
    state = _initial(initial_state, len(starts) - 1, A)
    _forward(
        starts, as_rows(u_np), as_rows(step_np), as_array(step_bias), A_t, as_rows(B_np), as_rows(C_np), D_np,
        as_rows(as_kernel_array(xz)), u.shape[-1], state, as_rows(y), _NOT_STORED,
    )  # fmt: skip
    return torch.from_numpy(y), torch.from_numpy(state).transpose(1, 2)


def _on_cuda(u, delta, A, B, C, D, initial_state):
    """mamba-ssm's kernel, which takes [B, E, L] and no initial state; without it, or with one, the plain recurrence."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        selective_scan_fn = None
    if selective_scan_fn is None or initial_state is not None:
        y, states = selective_scan_reference(u, delta, A, B, C, D, initial_state)
        return y.to(u.dtype), states[:, -1]
    u, delta, B, C = (x.transpose(1, 2).contiguous() for x in (u, delta, B, C))
    y, last = selective_scan_fn(u, delta.to(u.dtype), A, B, C, D.float(), return_last_state=True)
    return y.transpose(1, 2), last
