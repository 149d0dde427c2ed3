"""One position of Mamba's selective scan for many variants of the same sequences at once:

    y = sum_n C[n] * (exp(delta * A[:, n]) * h[:, n] + delta * u * B[n]) + D * u

P variants of S sequences share the states h of their sequences before that position, which are so read, never copied.
Without gradients. `selective_step_reference` is the plain formula; `selective_step` the fused kernel on the CPU, which
keeps a block of channels of one state in the first-level cache while all variants pass over it.

Shapes: u, delta [P, S, E]; A [E, N]; B, C [P, S, N]; D [E]; h [S, E, N]; y [P, S, E].
"""

import numba
import numpy as np
import torch

from universality.kernels.arrays import as_array
from universality.kernels.compiled import njit
from universality.kernels.elementary import FASTMATH, LOG2E, exp2_nonpositive

_BLOCK = 64  # channels per task


def selective_step_reference(u, delta, A, B, C, D, state):
    """The formula as it stands; makes an array of P states."""
    after = torch.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, :, None, :]
    return torch.einsum("psen,psn->pse", after, C) + D * u


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy")
def _step(u, delta, A_t, B, C, D, state, y):
    """state [S, N, E]; A_t [N, E] is A * log2(e)."""
    n_variants, n_seq, n_chan = u.shape
    n_state = A_t.shape[0]
    n_blocks = (n_chan + _BLOCK - 1) // _BLOCK
    for task in numba.prange(n_seq * n_blocks):
        s = task // n_blocks
        e0 = (task % n_blocks) * _BLOCK
        e1 = min(e0 + _BLOCK, n_chan)
        width = e1 - e0
        h = np.zeros((n_state, _BLOCK), dtype=np.float32)
        a = np.zeros((n_state, _BLOCK), dtype=np.float32)
        d = np.zeros(_BLOCK, dtype=np.float32)
        w = np.zeros(_BLOCK, dtype=np.float32)
        out = np.zeros(_BLOCK, dtype=np.float32)
        h[:, :width] = state[s, :, e0:e1]
        a[:, :width] = A_t[:, e0:e1]
        skip = D[e0:e1]
        for p in range(n_variants):
            delta_row, u_row, y_row = delta[p, s, e0:e1], u[p, s, e0:e1], y[p, s, e0:e1]
            for e in range(width):
                d[e] = delta_row[e]
                w[e] = d[e] * u_row[e]
                out[e] = skip[e] * u_row[e]
            for n in range(n_state):
                bn = B[p, s, n]
                cn = C[p, s, n]
                for e in range(_BLOCK):
                    out[e] += cn * (exp2_nonpositive(d[e] * a[n, e]) * h[n, e] + w[e] * bn)
            for e in range(width):
                y_row[e] = out[e]


def selective_step(u, delta, A, B, C, D, state):
    """y [P, S, E] in float32. Raises ValueError for shapes that do not fit each other."""
    (n_variants, n_seq, n_chan), n_state = u.shape, A.shape[1]
    small = (n_variants, n_seq, n_state)
    found = (delta.shape, A.shape, B.shape, C.shape, D.shape, state.shape)
    if found != (u.shape, (n_chan, n_state), small, small, (n_chan,), (n_seq, n_chan, n_state)):
        shapes = [tuple(x.shape) for x in (u, delta, A, B, C, D, state)]
        raise ValueError(f"shapes of u, delta, A, B, C, D, state do not fit each other: {shapes}")
    if u.device.type != "cpu":
        return selective_step_reference(u, delta, A, B, C, D, state)
    y = np.empty(u.shape, dtype=np.float32)
    arrays = as_array(u), as_array(delta), as_array(A.T) * LOG2E, as_array(B), as_array(C), as_array(D)
    _step(*arrays, as_array(state.transpose(1, 2)), y)
    return torch.from_numpy(y)
