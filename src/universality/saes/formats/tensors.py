"""Tensors of dictionaries, as float32 whatever they are stored in, under the names they are stored under."""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from universality.errors import StudyError

Tensors = dict[str, torch.Tensor]


def read_safetensors(path: Path) -> Tensors:
    """Raises StudyError naming the file if it is missing or damaged."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise StudyError(f"{path}: not a readable safetensors file: {_reason(error)}") from None
    return {name: tensor.float() for name, tensor in tensors.items()}


def read_state_dict(path: Path) -> Tensors:
    """Of a file that torch.save wrote; nothing but tensors is unpickled. Raises StudyError naming the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise whatever its reading ran into
        raise StudyError(f"{path}: not a readable file of tensors: {_reason(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise StudyError(f"{path}: is not a state dict, which has tensors alone")
    return {name: tensor.float() for name, tensor in state.items()}


def renamed(where: Path, tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """Tensors under our names, from a table of those they are stored under.

    A `weight` of a linear layer is transposed: W_enc is [d_in, F] and W_dec [F, d_out]. Raises StudyError naming
    `where` and the first tensor that is missing.
    """
    missing = [stored for stored in names.values() if stored not in tensors]
    if missing:
        raise StudyError(f"{where}: lacks the tensor {missing[0]!r}; it has {', '.join(sorted(tensors)) or 'none'}")
    return {ours: tensors[s].T if s.endswith(".weight") else tensors[s] for ours, s in names.items()}


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
