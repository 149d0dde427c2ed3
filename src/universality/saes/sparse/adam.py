"""Adam (Kingma & Ba 2015, arXiv 1412.6980) with what surrounds it in SAE training, in two passes over the weights.

    measure   takes the part along each decoder row out of its gradient, and sums the squares of all gradients
    step      scales the gradients to a norm of `max_norm` at most, updates, brings decoder rows back to unit norm and
              empties the gradients for the next step

torch.optim.Adam and clip_grad_norm_ are the reference. Parameters are float32; a row's sums have one order, so results
do not depend on the number of threads.
"""

import math

import numba
import numpy as np
import torch

from universality.kernels.compiled import njit
from universality.kernels.elementary import FASTMATH
from universality.saes.sparse.products import gradient

f32 = np.float32
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_SUMMED = FASTMATH | {"reassoc"}


@njit(parallel=True, fastmath=_SUMMED, error_model="numpy")
def _measure(weights, gradients, unit_rows, squares):
    n_rows, width = weights.shape
    for r in numba.prange(n_rows):
        w, g = weights[r], gradients[r]
        if unit_rows:
            along = f32(0)
            for i in range(width):
                along += w[i] * g[i]
            for i in range(width):
                g[i] -= along * w[i]
        total = f32(0)
        for i in range(width):
            total += g[i] * g[i]
        squares[r] = total


@njit(parallel=True, fastmath=_SUMMED, error_model="numpy")
def _step(weights, gradients, first, second, rate, scale, root, unit_rows):
    """`rate`: learning rate over first moments' correction; `root`: one over the root of the second moments' one."""
    n_rows, width = weights.shape
    beta1, beta2, epsilon = f32(_BETA1), f32(_BETA2), f32(_EPSILON)
    for r in numba.prange(n_rows):
        w, g, m, v = weights[r], gradients[r], first[r], second[r]
        total = f32(0)
        for i in range(width):
            slope = g[i] * scale
            m[i] += (f32(1) - beta1) * (slope - m[i])
            v[i] = beta2 * v[i] + (f32(1) - beta2) * slope * slope
            w[i] -= rate * m[i] / (np.sqrt(v[i]) * root + epsilon)
            g[i] = f32(0)
            total += w[i] * w[i]
        if unit_rows and total > f32(0):
            inverse = f32(1) / np.sqrt(total)
            for i in range(width):
                w[i] *= inverse


class Adam:
    """Steps all parameters of a module that are trained; `unit_rows` names those whose rows are kept at unit norm."""

    def __init__(self, module: torch.nn.Module, unit_rows: tuple[str, ...] = ()):
        self.n_steps = 0
        self._unit_rows = unit_rows
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._moments = {
            name: (torch.zeros_like(parameter), torch.zeros_like(parameter))
            for name, parameter in self._parameters.items()
        }
        for parameter in self._parameters.values():
            gradient(parameter)

    @torch.no_grad()
    def step(self, learning_rate: float, max_norm: float) -> float:
        """One step with the gradients summed since the last; their norm before it was brought down to `max_norm`."""
        self.n_steps += 1
        rate = learning_rate / (1 - _BETA1**self.n_steps)
        root = 1 / math.sqrt(1 - _BETA2**self.n_steps)
        squares = 0.0
        for name, parameter in self._parameters.items():
            weights, gradients = _rows(parameter), _rows(gradient(parameter))
            of_rows = np.empty(len(weights), np.float32)
            _measure(weights, gradients, name in self._unit_rows, of_rows)
            squares += float(of_rows.sum(dtype=np.float64))
        norm = math.sqrt(squares)
        scale = min(1.0, max_norm / (norm + 1e-6))  # as clip_grad_norm_ has it
        for name, parameter in self._parameters.items():
            arrays = (_rows(t) for t in (parameter, gradient(parameter), *self._moments[name]))
            _step(*arrays, f32(rate), f32(scale), f32(root), name in self._unit_rows)
        return norm

    def forget(self, name: str, rows: torch.Tensor) -> None:
        """Forget the moments of some rows of a parameter, as a feature has that begins anew; one that is not trained
        has none."""
        for moment in self._moments.get(name, ()):
            _tensor_rows(moment)[rows] = 0

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a step depends on beside the parameters."""
        moments = {
            f"{kind}.{name}": m for name, pair in self._moments.items() for kind, m in zip("mv", pair, strict=True)
        }
        return moments | {"n_steps": torch.tensor(self.n_steps)}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.n_steps = int(state["n_steps"])
        for name, pair in self._moments.items():
            for kind, moment in zip("mv", pair, strict=True):
                moment.copy_(state[f"{kind}.{name}"])


def _tensor_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A view [rows, width] with contiguous rows: W_enc is laid out feature by feature; a vector's numbers are rows."""
    if tensor.ndim < 2:
        return tensor.reshape(-1, 1)
    return tensor if tensor.is_contiguous() else tensor.T


def _rows(tensor: torch.Tensor) -> np.ndarray:
    return _tensor_rows(tensor.detach()).numpy()
