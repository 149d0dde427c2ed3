"""Tensors as the kernels take them."""

import numpy as np
import torch


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's values as a contiguous float32 array, without a copy where it is one already."""
    return np.ascontiguousarray(tensor.detach().to(torch.float32).numpy())
