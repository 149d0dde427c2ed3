"""Products with weights that stay as they are, without gradients, on the CPU: oneDNN's, for which a weight is laid out
once and kept so beside itself, in as much memory again.

At the sizes of Mamba-130M quicker than products with weights as they lie, by a sixth for many rows and a third for few.
On one thread and on two a row's product does not depend on the rows beside it or on the threads (tested); on many,
oneDNN may share a long sum out among them.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from universality.models.precision import project


class _LaidOut(NamedTuple):
    """A weight laid out, and what tells whether it is still that weight."""

    of: torch.Tensor
    """The weight's memory, which another tensor can't be given as long as this one is here."""
    version: int
    """The count of writes to it."""
    weight: torch.Tensor
    """The same values as oneDNN wants them."""


_LAID_OUT: WeakKeyDictionary[nn.Module, _LaidOut] = WeakKeyDictionary()


def project_packed(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`project(linear, x)`, by its laid out weight where there can be one: for float32 on the CPU, without gradients.

    A weight that was exchanged, or written to in place, is laid out anew; writes past torch's count of them (through
    `.data`, or the memory of `.numpy()`) go unseen.
    """
    weight, bias = linear.weight, linear.bias
    on_cpu = x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    # A tensor made in inference mode does not count what is written to it.
    if not on_cpu or weight.dtype != torch.float32 or weight.is_inference():
        _LAID_OUT.pop(linear, None)  # of what it was before
        return project(linear, x)
    wants_gradient = any(t is not None and t.requires_grad for t in (x, weight, bias))
    if (torch.is_grad_enabled() and wants_gradient) or not x.numel():
        return project(linear, x)
    found = _LAID_OUT.get(linear)
    if found is None or found.of.data_ptr() != weight.data_ptr() or found.version != weight._version:
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        found = _LAID_OUT[linear] = _LaidOut(weight.detach(), weight._version, laid_out)
    return torch.ops.mkldnn._linear_pointwise(x.float(), found.weight, bias, "none", [], "")
