"""Dictionaries of dictionary_learning (github.com/saprmarks/dictionary_learning): a folder with ae.pt and config.json.

ae.pt is a bare state dict; config.json names the class under `trainer.dict_class`, which decides on the rest. Codes are
those of the object that was saved. (AutoEncoder.from_pretrained rescales features to unit decoder norm by default; with
`normalize_decoder=False` it gives the same codes as here.) BatchTopK's are those outside training, above its threshold.
"""

import re
from pathlib import Path
from typing import NamedTuple

from universality.errors import StudyError
from universality.saes.base import SAE
from universality.saes.folder import from_stored_form
from universality.saes.formats.tensors import Tensors, read_state_dict, renamed
from universality.storage import read_json

CONFIG, WEIGHTS = "config.json", "ae.pt"


class _Layout(NamedTuple):
    """Architecture in sae-lens; is b_dec subtracted from the input; our names of the tensors, and theirs."""

    architecture: str
    centred: bool
    names: dict[str, str]


_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
_TOPK = _LINEAR | {"b_enc": "encoder.bias", "b_dec": "b_dec"}
_PLAIN = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
_GATED = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"}
_CLASSES = {
    "AutoEncoder": _Layout("standard", True, _LINEAR | {"b_enc": "encoder.bias", "b_dec": "bias"}),
    "AutoEncoderNew": _Layout("standard", False, _LINEAR | {"b_enc": "encoder.bias", "b_dec": "decoder.bias"}),
    "GatedAutoEncoder": _Layout("gated", True, _LINEAR | _GATED),
    "JumpReluAutoEncoder": _Layout("jumprelu", False, _PLAIN),
    "AutoEncoderTopK": _Layout("topk", True, _TOPK),
    "BatchTopKSAE": _Layout("jumprelu", True, _TOPK | {"threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": _Layout("jumprelu", True, _PLAIN),
}


def read(folder: Path) -> tuple[SAE, dict]:
    """A dictionary ready to encode, and its metadata. Raises StudyError naming the file, and the key or tensor."""
    config = read_json(folder / CONFIG)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise StudyError(f"{folder / CONFIG}: lacks 'trainer', which tells of the dictionary")
    kind = trainer.get("dict_class")
    if kind not in _CLASSES:
        raise StudyError(
            f"{folder / CONFIG}: trainer.dict_class {kind!r} cannot be read; allowed: {', '.join(_CLASSES)}"
        )
    state = read_state_dict(folder / WEIGHTS)
    layout = _CLASSES[kind]
    tensors = renamed(folder / WEIGHTS, state, layout.names)
    d_in, d_sae = tensors["W_enc"].shape
    cfg = {
        "architecture": layout.architecture,
        "d_in": trainer.get("activation_dim", d_in),
        "d_sae": trainer.get("dict_size", d_sae),
        "apply_b_dec_to_input": layout.centred,
    }
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].expand(d_sae)
    if layout.architecture == "topk":
        cfg["k"] = _k(folder, trainer, state)
    return from_stored_form(folder, cfg, tensors), _metadata(config, trainer)


def _k(folder: Path, trainer: dict, state: Tensors) -> int:
    """Stored beside the weights, by early versions in config.json alone."""
    if "k" not in state and "k" not in trainer:
        raise StudyError(f"{folder / CONFIG}: lacks 'trainer.k', which {WEIGHTS} lacks too")
    return int(state["k"]) if "k" in state else trainer["k"]


def _metadata(config: dict, trainer: dict) -> dict:
    buffer = config.get("buffer") or {}
    told = {
        "model_name": trainer.get("lm_name"),
        "hook_name": _hook_name(trainer.get("submodule_name"), trainer.get("layer")),
        "hook_layer": trainer.get("layer"),
        "context_size": buffer.get("ctx_len"),
        "training_architecture": trainer["dict_class"],
        "training_architecture_details": trainer,
    }
    return {key: value for key, value in told.items() if value is not None} | {"format": "dictionary_learning"}


def _hook_name(submodule: str | None, layer: int | None) -> str | None:
    """sae-lens' name of the residual stream, which is what is read where nothing else is said; others as they are."""
    if submodule is not None and not re.fullmatch(r"resid_post(_layer_\d+)?", submodule):
        return submodule
    return None if layer is None else f"blocks.{layer}.hook_resid_post"
