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
    n_chunks = (length + padding) // size
    dtype, skip = x.dtype, D[:, None] * x.float()
    # A padded position has delta 0: it writes nothing and its decay is 1.
    x, delta, B, C = (F.pad(v.float(), (0, 0) * (v.ndim - 2) + (0, padding)) for v in (x, delta, B, C))
    per_head = (n_batch, n_chunks, size, groups, heads // groups)
    delta = delta.reshape(per_head).permute(0, 1, 3, 4, 2)  # [B, c, G, H/G, l]
    written = x.reshape(*per_head, width).permute(0, 1, 3, 4, 2, 5) * delta[..., None]  # [B, c, G, H/G, l, P]
    B, C = (v.reshape(n_batch, n_chunks, size, groups, n_state).transpose(2, 3) for v in (B, C))  # [B, c, G, l, N]
    decay = torch.cumsum(delta * A.float().reshape(groups, -1, 1), -1)  # g_t, log of the decay since the chunk began
    own = _within_chunks(B, C, decay, written)
    before, last = _between_chunks(B, decay, written, initial_state)
    earlier = torch.exp(decay)[..., None] * (C[:, :, :, None] @ before.transpose(-1, -2))
    y = (own + earlier).permute(0, 1, 4, 2, 3, 5).reshape(n_batch, -1, heads, width)[:, :length]
    return (y + skip).to(dtype), last


def _within_chunks(B, C, decay, written):
    """What positions of a chunk read of what the same chunk wrote: [B, c, G, H/G, l, P]."""
    size = decay.shape[-1]
    scores = C @ B.transpose(-1, -2)  # [B, c, G, l, l], shared by the heads of a group
    future = torch.ones(size, size, dtype=torch.bool, device=decay.device).triu(1)
    since = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf)
    return (torch.exp(since) * scores[:, :, :, None]) @ written


def _between_chunks(B, decay, written, initial_state):
    """The state before each chunk [B, c, G, H/G, P, N] and the last one [B, H, P, N]."""
    left = torch.exp(decay[..., -1:] - decay)  # what is left of each write at the chunk's end
    added = (written * left[..., None]).transpose(-1, -2) @ B[:, :, :, None]
    through = torch.exp(decay[..., -1])[..., None, None]
    state = torch.zeros_like(added[:, 0])
    if initial_state is not None:
        state = initial_state.float().reshape(state.shape)
    before = []
    for chunk in range(added.shape[1]):
        before.append(state)
        state = through[:, chunk] * state + added[:, chunk]
    return torch.stack(before, 1), state.flatten(1, 2)


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
