"""Products with weights that stay as they are, without gradients, on the CPU: oneDNN's, for which a weight is laid out
once and kept so beside itself.

Quicker than the ones over weights as they lie, at every number of rows; and a row's product does not depend on the rows
beside it or on the number of threads.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from universality.models.precision import project


class _Packed(NamedTuple):
    of: torch.Tensor
    """The weight,"""
    version: int
    """at this count of writes to it,"""
    weight: torch.Tensor
    """laid out."""


_PACKED: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


def project_packed(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`project(linear, x)`, by its laid out weight where there can be one: for float32 on the CPU, without gradients.

    A weight that was written to in place, or exchanged, is laid out anew.
    """
    weight, bias = linear.weight, linear.bias
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    on_cpu = x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    # A tensor made in inference mode does not count what is written to it.
    if needs_gradient or not on_cpu or weight.dtype != torch.float32 or weight.is_inference() or not x.numel():
        return project(linear, x)
    packed = _PACKED.get(linear)
    if packed is None or packed.of is not weight or packed.version != weight._version:
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        packed = _PACKED[linear] = _Packed(weight, weight._version, laid_out)
    return torch.ops.mkldnn._linear_pointwise(x.float(), packed.weight, bias, "none", [], "")
