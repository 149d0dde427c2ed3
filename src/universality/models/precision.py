"""Matrix products in bfloat16, where the CPU has instructions for them; everything else stays in float32."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

Products = Literal["bfloat16", "float32"]


def use_bf16_products(hf: nn.Module, keep: tuple[str, ...] = ()) -> None:
    """Round the weights of all linear layers to bfloat16 and have them multiply in it; outputs are float32 again.

    Layers whose name ends in one of `keep` stay as they are.
    """
    for name, module in hf.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not name.endswith(keep):
            module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.detach().bfloat16(), requires_grad=False)
            module.forward = _in_bf16(module.forward)  # type: ignore[method-assign]


def _in_bf16(forward):
    return lambda x: forward(x.bfloat16()).to(torch.float32)


def project(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """linear(x) in the dtype of its weight, not turned back into float32."""
    return F.linear(x.to(linear.weight.dtype), linear.weight, linear.bias)
