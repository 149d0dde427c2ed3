"""The scan of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, section 6): one scalar decay per head, so that a chunk of
positions is a masked matrix product and only the states between chunks are a recurrence.

    h_t = exp(delta_t * A) * h_{t-1} + delta_t * x_t B_t^T          state   [B, H, P, N], one decay a head
    y_t = h_t C_t + D * x_t                                         output  [B, L, H, P]

* `chunked_scan_reference`: the plain recurrence, any dtype, differentiated by autograd.
* `chunked_scan`: batched matrix products over chunks, differentiable; on a GPU the kernels of mamba-ssm.
* `gated_head_scan`: a fused CPU kernel without gradients, with what Mamba-2 does just before and after it: softplus of
  the step size and the gate. One head's state fits the first-level cache, so on a CPU the recurrence itself is quicker
  than products over chunks; vectors run along P.

With g_t the sum of delta * A up to t within a chunk, the chunk's own part of y is (C B^T * exp(g_t - g_s), s <= t)
times delta * x; the part of earlier chunks is exp(g_t) C_t h. No B x L x E x N tensor exists: there is one state a
chunk.

Shapes: x [B, L, H, P]; delta [B, L, H], already positive; A, D [H]; B, C [B, L, G, N], where H / G heads share a group;
initial_state, last state [B, H, P, N] in float32.
"""

import numba
import numpy as np
import torch
import torch.nn.functional as F

from universality.kernels.arrays import as_array, as_kernel_array, as_rows, output_array, row_starts
from universality.kernels.compiled import njit
from universality.kernels.elementary import FASTMATH, LOG2E, exp2_nonpositive, load, silu, softplus

_CHUNK = 64  # positions: the masked product grows with it, the number of states between chunks falls


def chunked_scan_reference(x, delta, A, B, C, D, initial_state=None):
    """The plain recurrence. Returns (y [B, L, H, P], every state [B, L, H, P, N])."""
    per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(per_group, 2), C.repeat_interleave(per_group, 2)
    decay = torch.exp(delta * A)
    write = (delta[..., None] * x)[..., None] * B[..., None, :]
    state = torch.zeros_like(write[:, 0]) if initial_state is None else initial_state
    states = []
    for t in range(x.shape[1]):
        state = decay[:, t, :, None, None] * state + write[:, t]
        states.append(state)
    states = torch.stack(states, dim=1)
    return torch.einsum("blhpn,blhn->blhp", states, C) + D[:, None] * x, states


def chunked_scan(x, delta, A, B, C, D, initial_state=None):
    """Returns (y [B, L, H, P] in x's dtype, last state [B, H, P, N] in float32)."""
    if x.device.type == "cuda":
        found = _on_cuda(x, delta, A, B, C, D, initial_state)
        if found is not None:
            return found
    n_batch, length, heads, width = x.shape
    groups, n_state = B.shape[2:]
    size = min(_CHUNK, length)
    padding = -length % size
    dtype, skip = x.dtype, D[:, None] * x.float()
    # A padded position has delta 0: it writes nothing and its decay is 1.
    x, delta, B, C = (_padded(v.float(), padding) for v in (x, delta, B, C))
    chunks = (n_batch, (length + padding) // size, size)
    # Heads of a group stay beside each other, so that what they share, B and C, takes part in one product for all.
    decay = running_sum((delta * A.float()).reshape(*chunks, groups, -1), 2)  # g_t: [B, c, l, G, H/G]
    written = (x * delta[..., None]).reshape(*chunks, groups, heads // groups, width)
    B, C = (v.reshape(*chunks, groups, n_state).transpose(2, 3) for v in (B, C))  # [B, c, G, l, N]
    y = _within_chunks(B, C, decay, written)
    before, last = _between_chunks(B, decay, written, initial_state)
    earlier = (C @ before).transpose(2, 3).unflatten(-1, (-1, width))  # [B, c, l, G, H/G, P]
    y = y + torch.exp(decay)[..., None] * earlier
    y = y.reshape(n_batch, -1, heads, width)[:, :length]
    return (y + skip).to(dtype), last


def running_sum(x, axis):
    """torch.cumsum, which has no deterministic form on a GPU, as a triangular product."""
    ones = torch.ones(x.shape[axis], x.shape[axis], dtype=x.dtype, device=x.device).tril()
    return torch.tensordot(ones, x, dims=([1], [axis])).movedim(0, axis)


def _padded(x, padding):
    """`padding` zeros at the end of axis 1."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding)) if padding else x


def _within_chunks(B, C, decay, written):
    """What positions of a chunk read of what the same chunk wrote: [B, c, l, G, H/G, P]."""
    size = decay.shape[2]
    scores = C @ B.transpose(-1, -2)  # [B, c, G, l, l], shared by the heads of a group
    future = torch.ones(size, size, dtype=torch.bool, device=decay.device).triu(1)
    by_head = decay.permute(0, 1, 3, 4, 2)
    since = (by_head[..., :, None] - by_head[..., None, :]).masked_fill_(future, -torch.inf)
    mixing = torch.exp(since) * scores[:, :, :, None]
    return (mixing @ written.permute(0, 1, 3, 4, 2, 5)).permute(0, 1, 4, 2, 3, 5)


def _between_chunks(B, decay, written, initial_state):
    """The state before each chunk [B, c, G, N, (H/G) * P] and the last one [B, H, P, N]."""
    n_batch, n_chunks, _, groups, per_group, width = written.shape
    left = torch.exp(decay[:, :, -1:] - decay)  # what is left of each write at the chunk's end
    added = B.transpose(-1, -2) @ (written * left[..., None]).transpose(2, 3).flatten(-2)
    through = torch.exp(decay[:, :, -1]).repeat_interleave(width, -1)[..., None, :]  # [B, c, G, 1, (H/G) * P]
    state = torch.zeros_like(added[:, 0])
    if initial_state is not None:
        state = initial_state.float().reshape(n_batch, groups, per_group * width, -1).transpose(-1, -2)
    before = []
    for chunk in range(n_chunks):
        before.append(state)
        state = through[:, chunk] * state + added[:, chunk]
    return torch.stack(before, 1), state.transpose(-1, -2).reshape(n_batch, groups * per_group, width, -1)


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy")
def _gated(starts, mixed, projected, step_bias, step_low, step_high, A, D, n_state, state, y):
    """mixed [R, H * P + 2GN] is u, B, C; projected [R, ...] begins with z [H * P] and ends with the steps [H].

    starts [B + 1]: which rows begin a sequence, and R. A [H] is A * log2(e). Fills y [R, H * P], times silu(z);
    state [B, H, N, P] holds h_0 and ends as h_L.
    """
    n_batch, inner = len(starts) - 1, y.shape[1]
    heads = A.shape[0]
    width = inner // heads
    per_group = heads // ((mixed.shape[1] - inner) // (2 * n_state))
    steps_at = projected.shape[1] - heads
    rows = n_state + (-n_state) % 4  # of the state, made up with rows that nothing writes or reads
    for task in numba.prange(n_batch * heads):
        b, head = task // heads, task % heads
        h = np.zeros((rows, width), dtype=np.float32)
        h[:n_state] = state[b, head]
        write = np.zeros(rows, dtype=np.float32)
        read = np.zeros(rows, dtype=np.float32)
        x = np.zeros(width, dtype=np.float32)
        out = np.zeros(width, dtype=np.float32)
        p0, p1 = head * width, (head + 1) * width
        b0 = inner + (head // per_group) * n_state
        c0 = (inner + mixed.shape[1]) // 2 + (head // per_group) * n_state
        for t in range(starts[b], starts[b + 1]):
            step = softplus(load(projected[t, steps_at + head]) + step_bias[head])
            step = min(max(step, step_low), step_high)
            decay = exp2_nonpositive(step * A[head])
            x_row, b_row, c_row = mixed[t, p0:p1], mixed[t, b0 : b0 + n_state], mixed[t, c0 : c0 + n_state]
            for n in range(n_state):
                write[n] = step * load(b_row[n])
                read[n] = load(c_row[n])
            for p in range(width):
                x[p] = load(x_row[p])
                out[p] = D[head] * x[p]
            for n in range(0, rows, 4):  # four rows at a time: out is read and written a quarter as often
                h0, h1, h2, h3 = h[n], h[n + 1], h[n + 2], h[n + 3]
                w0, w1, w2, w3 = write[n], write[n + 1], write[n + 2], write[n + 3]
                r0, r1, r2, r3 = read[n], read[n + 1], read[n + 2], read[n + 3]
                for p in range(width):
                    s0 = decay * h0[p] + w0 * x[p]
                    s1 = decay * h1[p] + w1 * x[p]
                    s2 = decay * h2[p] + w2 * x[p]
                    s3 = decay * h3[p] + w3 * x[p]
                    h0[p], h1[p], h2[p], h3[p] = s0, s1, s2, s3
                    out[p] += (r0 * s0 + r1 * s1) + (r2 * s2 + r3 * s3)
            y_row, z_row = y[t, p0:p1], projected[t, p0:p1]
            for p in range(width):
                y_row[p] = out[p] * silu(load(z_row[p]))
        state[b, head] = h[:n_state]


def gated_head_scan(
    mixed, projected, step_bias, step_limit, A, D, n_state, initial_state=None, out=None, cu_seqlens=None
):
    """Without gradients, in float32: (y * silu(z) [B, L, H * P], last state [B, H, P, N]).

    mixed [B, L, H * P + 2GN] is u, B and C beside each other; projected [B, L, H * P + ... + H] begins with z and ends
    with the step sizes before softplus and step_bias [H], which are then held within step_limit. The first is written
    to `out`, contiguous float32, where that is given. With `cu_seqlens` the positions of all sequences are in one row,
    [R, ...] in place of [B, L, ...]: see `row_starts`.
    """
    inner = projected.shape[-1] - mixed.shape[-1] - A.shape[0]
    fit = mixed.shape[:-1] == projected.shape[:-1]
    if not fit or inner % A.shape[0] or (mixed.shape[-1] - inner) % (2 * n_state) or A.shape != D.shape:
        raise ValueError(f"{tuple(mixed.shape)} and {tuple(projected.shape)} do not fit {len(A)} heads and N={n_state}")
    starts, y = row_starts(mixed.shape, cu_seqlens), output_array((*mixed.shape[:-1], inner), out)
    state = np.zeros((len(starts) - 1, len(A), n_state, inner // len(A)), dtype=np.float32)
    if initial_state is not None:
        state[:] = as_array(initial_state.transpose(2, 3))
    low, high = np.clip(np.array(step_limit), 0, np.finfo(np.float32).max).astype(
        np.float32
    )  # kernels know no infinity
    _gated(
        starts, as_rows(as_kernel_array(mixed)), as_rows(as_kernel_array(projected)), as_array(step_bias), low, high,
        as_array(A) * LOG2E, as_array(D), n_state, state, as_rows(y),
    )  # fmt: skip
    return torch.from_numpy(y), torch.from_numpy(state).transpose(2, 3)


def _on_cuda(x, delta, A, B, C, D, initial_state):
    """mamba-ssm's kernel; None where it is not installed."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    return mamba_chunk_scan_combined(
        x, delta.to(x.dtype), A, B.to(x.dtype), C.to(x.dtype), chunk_size=256, D=D,
        initial_states=initial_state, return_final_states=True,
    )  # fmt: skip
