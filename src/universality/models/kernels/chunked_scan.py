"""The scan of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, section 6): one scalar decay per head, so that a chunk of
positions is a masked matrix product and only the states between chunks are a recurrence.

    h_t = exp(delta_t * A) * h_{t-1} + delta_t * x_t B_t^T          state   [B, H, P, N], one decay a head
    y_t = h_t C_t + D * x_t                                         output  [B, L, H, P]

* `chunked_scan_reference`: the plain recurrence, any dtype, differentiated by autograd.
* `chunked_scan`: batched matrix products over chunks, differentiable; on a GPU the kernels of mamba-ssm.

With g_t the sum of delta * A up to t within a chunk, the chunk's own part of y is (C B^T * exp(g_t - g_s), s <= t)
times delta * x; the part of earlier chunks is exp(g_t) C_t h. No B x L x E x N tensor exists: there is one state a
chunk.

Shapes: x [B, L, H, P]; delta [B, L, H], already positive; A, D [H]; B, C [B, L, G, N], where H / G heads share a group;
initial_state, last state [B, H, P, N] in float32.
"""

import torch
import torch.nn.functional as F

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
    decay = torch.cumsum((delta * A.float()).reshape(*chunks, groups, -1), 2)  # g_t: [B, c, l, G, H/G]
    written = (x * delta[..., None]).reshape(*chunks, groups, heads // groups, width)
    B, C = (v.reshape(*chunks, groups, n_state).transpose(2, 3) for v in (B, C))  # [B, c, G, l, N]
    y = _within_chunks(B, C, decay, written)
    before, last = _between_chunks(B, decay, written, initial_state)
    earlier = (C @ before).transpose(2, 3).unflatten(-1, (-1, width))  # [B, c, l, G, H/G, P]
    y = y + torch.exp(decay)[..., None] * earlier
    y = y.reshape(n_batch, -1, heads, width)[:, :length]
    return (y + skip).to(dtype), last


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
