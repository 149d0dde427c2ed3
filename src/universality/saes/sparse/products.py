"""Products of sparse codes [B, F] with dense matrices, and their gradients: cost follows the active features.

    decode          out[b] = sum_e values[e] W[f_e]                       W_dec's product
    entry_products  out[e] = <dense[b_e], W[f_e]>                         the gradient of `decode` in its values
    add_outer       dW[f] += sum_e values[e] dense[b_e]                   the gradient of both in W

for entries e of a pattern with row b_e and feature f_e; W [F, d] with contiguous rows, dense [B, d], all float32. Each
row of a result is summed by one thread in the order of the pattern: no result depends on the number of threads.

The differentiable forms add gradients of W into `W.grad` in place, and return none to autograd: a new array of W's size
at every step would cost more than the products.
"""

import numba
import numpy as np
import torch

from universality.kernels.arrays import as_array
from universality.kernels.compiled import njit
from universality.kernels.elementary import FASTMATH
from universality.saes.sparse.pattern import Pattern


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy")
def _decode(starts, features, values, weights, out):
    n_rows, width = out.shape
    for b in numba.prange(n_rows):
        total = out[b]
        total[:] = 0
        for e in range(starts[b], starts[b + 1]):
            value, row = values[e], weights[features[e]]
            for i in range(width):
                total[i] += value * row[i]


# Reassociation lets a dot product run in vectors; its order of summation is still one and the same.
@njit(parallel=True, fastmath=FASTMATH | {"reassoc"}, error_model="numpy")
def _entry_products(starts, features, dense, weights, out):
    n_rows, width = dense.shape
    for b in numba.prange(n_rows):
        left = dense[b]
        for e in range(starts[b], starts[b + 1]):
            right = weights[features[e]]
            total = np.float32(0)
            for i in range(width):
                total += left[i] * right[i]
            out[e] = total


@njit(parallel=True, fastmath=FASTMATH, error_model="numpy")
def _add_outer(starts, rows, order, values, dense, out):
    n_features, width = out.shape
    for f in numba.prange(n_features):
        total = out[f]
        for e in range(starts[f], starts[f + 1]):
            value, row = values[order[e]], dense[rows[e]]
            for i in range(width):
                total[i] += value * row[i]


def decode(pattern: Pattern, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Codes [B, F] with `values` [n] at the pattern's entries times `weights` [F, d]: [B, d]."""
    out = torch.empty(pattern.n_rows, weights.shape[1])
    _decode(pattern.starts, pattern.features, as_array(values), as_array(weights), out.numpy())
    return out


def entry_products(pattern: Pattern, dense: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """At each entry the product of its row of `dense` [B, d] and its feature's row of `weights` [F, d]: [n]."""
    out = torch.empty(len(pattern))
    _entry_products(pattern.starts, pattern.features, as_array(dense), as_array(weights), out.numpy())
    return out


def add_outer(pattern: Pattern, values: torch.Tensor, dense: torch.Tensor, out: torch.Tensor) -> None:
    """Add to `out` [F, d], whose rows are contiguous, the transposed codes [F, B] times `dense` [B, d]."""
    by_feature = pattern.by_feature
    _add_outer(*by_feature, as_array(values), as_array(dense), out.numpy())


def sum_by_feature(pattern: Pattern, values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` [n] of each feature's entries: [F]."""
    return torch.from_numpy(np.bincount(pattern.features, as_array(values), pattern.n_features)).float()


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor that the parameter's gradient is summed in."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class Decode(torch.autograd.Function):
    """decode(pattern, values, W_dec), differentiable in `values`; W_dec's gradient is added in place."""

    @staticmethod
    def forward(ctx, values, W_dec, pattern):
        ctx.save_for_backward(values)
        ctx.W_dec, ctx.pattern = W_dec, pattern
        return decode(pattern, values, W_dec)

    @staticmethod
    def backward(ctx, grad):
        (values,) = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            add_outer(ctx.pattern, values, grad, gradient(ctx.W_dec))
        return entry_products(ctx.pattern, grad, ctx.W_dec), None, None


class Projection(torch.autograd.Function):
    """`values` [n] as what they were computed as: pre-activations (x - b_dec) @ W_enc + b_enc at the pattern's entries.

    `centred` is x - b_dec, or x itself where the encoder has no b_dec (None). Differentiable in the biases; W_enc's
    gradient is added in place.
    """

    @staticmethod
    def forward(ctx, values, centred, W_enc, b_enc, b_dec, pattern):
        ctx.centred, ctx.W_enc, ctx.pattern, ctx.has_b_dec = centred, W_enc, pattern, b_dec is not None
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        if ctx.needs_input_grad[2]:
            add_outer(ctx.pattern, grad, ctx.centred, gradient(ctx.W_enc).T)
        of_bias = sum_by_feature(ctx.pattern, grad)
        of_b_dec = -(ctx.W_enc.detach() @ of_bias) if ctx.has_b_dec else None
        return None, None, None, of_bias, of_b_dec, None


class OfFeature(torch.autograd.Function):
    """A number of each feature [F], at each entry [n]."""

    @staticmethod
    def forward(ctx, of_feature, pattern):
        ctx.pattern = pattern
        return of_feature[pattern.index]

    @staticmethod
    def backward(ctx, grad):
        return sum_by_feature(ctx.pattern, grad), None


class Rows(torch.autograd.Function):
    """Rows [n, d] of a parameter, or of its transpose, of different features; its gradient is added in place."""

    @staticmethod
    def forward(ctx, weights, features, transposed):
        ctx.weights, ctx.features, ctx.transposed = weights, features, transposed
        return (weights.T if transposed else weights)[features]

    @staticmethod
    def backward(ctx, grad):
        into = gradient(ctx.weights)
        (into.T if ctx.transposed else into)[ctx.features] += grad
        return None, None, None


class RowNorms(torch.autograd.Function):
    """Euclidean norms [F] of the rows of a parameter [F, d]; its gradient is added in place."""

    @staticmethod
    def forward(ctx, weights):
        norms = weights.norm(dim=1)
        ctx.weights, ctx.norms = weights, norms
        return norms

    @staticmethod
    def backward(ctx, grad):
        gradient(ctx.weights).addcmul_(ctx.weights.detach(), (grad / ctx.norms.clamp_min(1e-30))[:, None])
        return None
