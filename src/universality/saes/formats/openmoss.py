"""Dictionaries of OpenMOSS' language-model-saes (github.com/OpenMOSS/Language-Model-SAEs; lm-saes, now llamascopium): a
folder with config.json and sae_weights.safetensors.

    pre   = s_in x @ W_E + b_E
    codes = pre where the activation lets pre * |W_D| through (pre itself unless `sparsity_include_decoder_norm`)
    y_hat = (codes @ W_D + b_D) / s_out

The scales are by `norm_activation`: sqrt(d) over the mean norm at the site, stored beside the weights (dataset-wise); 1
(inference); of each token's own norm (token-wise). Where `hook_point_out` is not `hook_point_in` it is a transcoder.
"""

from pathlib import Path

import torch

from universality.errors import StudyError
from universality.saes.base import SAE
from universality.saes.folder import from_stored_form
from universality.saes.formats.tensors import Tensors, read_safetensors, renamed
from universality.storage import read_json

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
_NAMES = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D"}
_NORM = "dataset_average_activation_norm."
_ARCHITECTURES = {  # of an activation's SAE and transcoder
    "relu": ("standard", "transcoder"),
    "jumprelu": ("jumprelu", "jumprelu_transcoder"),
    "topk": ("topk", "topk_transcoder"),
}
_SCALINGS = ("dataset-wise", "inference", "token-wise")
# Keys with the only values of theirs that are read, which they have where they are left out.
_ONLY = {"sae_type": "sae", "use_glu_encoder": False, "apply_decoder_bias_to_pre_encoder": False}


def read(folder: Path) -> tuple[SAE, dict]:
    """A dictionary ready to encode, and its metadata. Raises StudyError naming the file, and the key or tensor."""
    config = read_json(folder / CONFIG)
    _check(folder, config)
    stored = read_safetensors(folder / WEIGHTS)
    hook_points = config["hook_point_in"], config.get("hook_point_out", config["hook_point_in"])
    transcoder = hook_points[0] != hook_points[1]
    scaling = _scaling(folder, config, stored)
    if transcoder and scaling == "token-wise":
        raise StudyError(f"{folder / CONFIG}: norm_activation 'token-wise' cannot be read of a transcoder")
    cfg, tensors = _stored_form(folder, config, stored, transcoder)
    cfg["normalize_activations"] = "constant_norm_rescale" if scaling == "token-wise" else "none"
    sae = from_stored_form(folder, cfg, tensors)
    if scaling == "dataset-wise":
        sae.rescale(*(_scale(folder, stored, name, sae.d_in) for name in hook_points))
    return sae, _metadata(config, transcoder)


def _check(folder: Path, config: dict) -> None:
    if "hook_point_in" not in config:
        raise StudyError(f"{folder / CONFIG}: lacks 'hook_point_in'")
    for key, only in _ONLY.items():
        if config.get(key, only) != only:
            raise StudyError(f"{folder / CONFIG}: {key} {config[key]!r} cannot be read; allowed: {only!r}")
    activation = _activation(config)
    if activation not in _ARCHITECTURES:
        allowed = ", ".join(_ARCHITECTURES)
        raise StudyError(f"{folder / CONFIG}: act_fn {activation!r} cannot be read; allowed: {allowed}")
    if activation == "topk" and "top_k" not in config:
        raise StudyError(f"{folder / CONFIG}: lacks 'top_k'")


def _activation(config: dict) -> str:
    return str(config.get("act_fn", "relu")).lower()


def _stored_form(folder: Path, config: dict, stored: Tensors, transcoder: bool) -> tuple[dict, Tensors]:
    """As folder.stored_form has it, on scaled inputs."""
    bias = {"b_dec": "b_D"} if config.get("use_decoder_bias", True) else {}
    tensors = renamed(folder / WEIGHTS, stored, _NAMES | bias)
    d_in, d_sae = tensors["W_enc"].shape
    width = config.get("d_model", d_in)
    tensors = {"b_dec": torch.zeros(width)} | tensors
    by_norm = config.get("sparsity_include_decoder_norm", True)
    norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-30) if by_norm else torch.ones(d_sae)
    activation = _activation(config)
    architecture = _ARCHITECTURES[activation][transcoder]
    if activation == "topk" and (transcoder or not torch.allclose(norms, norms[0], rtol=1e-6)):
        tensors["rank"] = norms  # which rank nothing where they are one, but for rounding
        architecture = "topk_transcoder" if transcoder else "ranked_topk"
    elif activation == "jumprelu":
        tensors["threshold"] = _threshold(folder, stored) / norms
    sizes = {"d_in": width, "d_sae": d_sae, "d_out": width, "k": config.get("top_k")}
    return sizes | {"architecture": architecture, "apply_b_dec_to_input": False}, tensors


def _threshold(folder: Path, stored: Tensors) -> torch.Tensor:
    name = "activation_function.log_jumprelu_threshold"
    found = stored.get(name, stored.get("log_jumprelu_threshold"))
    if found is None:
        raise StudyError(f"{folder / WEIGHTS}: lacks the tensor {name!r}, which act_fn 'jumprelu' needs")
    return found.exp()


def _scaling(folder: Path, config: dict, stored: Tensors) -> str:
    scaled = any(name.startswith(_NORM) for name in stored)
    scaling = config.get("norm_activation", "dataset-wise" if scaled else "inference")
    if scaling not in _SCALINGS:
        raise StudyError(
            f"{folder / CONFIG}: norm_activation {scaling!r} cannot be read; allowed: {', '.join(_SCALINGS)}"
        )
    return scaling


def _scale(folder: Path, stored: Tensors, hook_point: str, width: int) -> float:
    name = _NORM + hook_point
    if name not in stored:
        raise StudyError(f"{folder / WEIGHTS}: lacks {name!r}, which norm_activation 'dataset-wise' needs")
    norm = float(stored[name])
    if not 0 < norm < float("inf"):
        raise StudyError(f"{folder / WEIGHTS}: {name} is {norm}, no norm that activations can have")
    return width**0.5 / norm


def _metadata(config: dict, transcoder: bool) -> dict:
    told = {
        "model_name": config.get("model_name"),
        "hook_name": config.get("hook_point_in"),
        "hook_name_out": config.get("hook_point_out") if transcoder else None,
        "training_architecture_details": config,
    }
    return {key: value for key, value in told.items() if value is not None} | {"format": "openmoss"}
