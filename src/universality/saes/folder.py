"""Dictionaries on disk: folders in the format of sae-lens 6.

A folder has cfg.json and sae_weights.safetensors; one that was trained here also sparsity.safetensors, the logarithms
of how often features fired towards the end, and training.parquet. What sae-lens has no name for is stored as what it is
outside training: BatchTopK and Matryoshka SAEs as JumpReLU ones of one threshold,
transcoders as its jumprelu transcoders. A crosscoder, which sae-lens does not know, has architecture "crosscoder", the
same layout, and in cfg.json the width and the scale of every site too. Nor does sae-lens know what saes.ranked_topk is
for, whose architectures are "ranked_topk" and "topk_transcoder" or "topk_skip_transcoder".
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from universality.errors import StudyError
from universality.saes.base import SAE
from universality.saes.batch_topk import BatchTopKSAE
from universality.saes.crosscoder import Crosscoder
from universality.saes.formats.sae_lens_5 import upgraded
from universality.saes.formats.tensors import Tensors, read_safetensors
from universality.saes.gated import GatedSAE
from universality.saes.jumprelu import JumpReLUSAE
from universality.saes.ranked_topk import RankedTopKSAE, TopKTranscoder
from universality.saes.settings import (
    CrosscoderSettings,
    GatedSettings,
    JumpReLUSettings,
    ReluL1Settings,
    TopKSettings,
    TranscoderSettings,
)
from universality.saes.standard import StandardSAE
from universality.saes.topk import TopKSAE
from universality.saes.transcoder import PredictsTarget, Transcoder
from universality.storage import read_json, replacing, write_json, write_table, write_tensors

CFG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
CURVES = "training.parquet"
_SPARSITY_EPSILON = 1e-10  # so that the logarithm of nothing is -10, as in sae-lens
_VERSION = "6.0.0"  # of sae-lens, the first of the format: without one it reads a folder as an earlier version's
_NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
_UNUSED: dict[str, Any] = {"k_aux": 1, "aux_coefficient": 0.0}  # of settings that only training looks at

# Architecture -> tensors beside W_enc, W_dec, b_dec, all [F] but W_skip [d_out, d_in].
_TENSORS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc", "W_skip"),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold", "W_skip"),
    "crosscoder": ("b_enc", "threshold"),
    "ranked_topk": ("b_enc", "rank"),
    "topk_transcoder": ("b_enc", "rank"),
    "topk_skip_transcoder": ("b_enc", "rank", "W_skip"),
}
_REFUSED = {  # architectures of sae-lens whose codes are not of the form that all here have
    "abstopk": "its codes can be negative",
    "temporal": "its codes depend on the tokens before",
    "matching_pursuit": "it encodes in steps that depend on each other",
}


def stored_form(sae: SAE) -> tuple[dict, Tensors]:
    """(cfg.json without its metadata, tensors)."""
    cfg = {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.encoder_centred,
        "normalize_activations": sae.normalisation,
        "reshape_activations": "none",
        "architecture": sae.architecture,
    }
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec, "b_enc": sae.b_enc}
    if isinstance(sae, RankedTopKSAE):
        cfg["k"] = sae.settings.k
        tensors["rank"] = sae.rank
    elif isinstance(sae, TopKSAE):
        cfg |= {"k": sae.settings.k, "rescale_acts_by_decoder_norm": False}
    elif isinstance(sae, GatedSAE):
        tensors |= {"b_gate": tensors.pop("b_enc"), "b_mag": sae.b_mag, "r_mag": sae.r_mag}
    elif isinstance(sae, JumpReLUSAE):
        tensors["threshold"] = sae.threshold()
    elif isinstance(sae, BatchTopKSAE):
        tensors["threshold"] = sae.threshold.expand(sae.d_sae)
        cfg["architecture"] = "jumprelu"
    if isinstance(sae, PredictsTarget):
        activation = "jumprelu" if isinstance(sae, Transcoder) else "topk"
        cfg |= {"architecture": f"{activation}{'' if sae.W_skip is None else '_skip'}_transcoder", "d_out": sae.d_out}
        tensors |= {} if sae.W_skip is None else {"W_skip": sae.W_skip}
    if isinstance(sae, Crosscoder):
        cfg |= {"architecture": "crosscoder", "widths": sae.widths, "scales": sae.scales}
    return cfg, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def write_sae(folder: Path, sae: SAE, metadata: dict) -> None:
    """Fill `folder`, which exists."""
    cfg, tensors = stored_form(sae)
    write_json(folder / CFG, cfg | {"metadata": {"sae_lens_version": _VERSION} | metadata})
    write_tensors(folder / WEIGHTS, {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()})


def save_sae(
    sae: SAE,
    out: Path,
    metadata: dict,
    curves: dict[str, list] | None = None,
    frequencies: torch.Tensor | None = None,
) -> None:
    """Write a folder, with the training curves and how often each feature fires [F], where that is known."""
    with replacing(out) as folder:
        folder.mkdir()
        write_sae(folder, sae, metadata)
        if curves is not None:
            write_table(folder / CURVES, curves)
        if frequencies is not None:
            sparsity = torch.log10(frequencies + _SPARSITY_EPSILON).float()
            write_tensors(folder / SPARSITY, {"sparsity": sparsity.numpy()})


def read_frequencies(folder: Path) -> torch.Tensor | None:
    """How often each feature fires [F], where the folder tells."""
    if not (folder / SPARSITY).is_file():
        return None
    return 10 ** read_safetensors(folder / SPARSITY)["sparsity"] - _SPARSITY_EPSILON


def read_sae_lens(folder: Path) -> tuple[SAE, dict]:
    """A dictionary from a folder of sae-lens 6, or of one before, ready to encode, and its metadata.

    Raises StudyError naming the folder if a file or a key is missing, shapes disagree, or something is unknown.
    """
    cfg, tensors = upgraded(folder / CFG, read_json(folder / CFG)), read_safetensors(folder / WEIGHTS)
    if bool((tensors.get("scaling_factor", torch.zeros(1)) == 1).all()):
        del tensors["scaling_factor"]  # of the codes, which versions before 6 wrote also where it is none
    return from_stored_form(folder, cfg, tensors), cfg["metadata"]


def from_stored_form(folder: Path, cfg: dict, tensors: Tensors) -> SAE:
    """What `stored_form` is of, ready to encode; `folder` stands in messages alone."""
    architecture = cfg.get("architecture")
    if architecture in _REFUSED:
        raise StudyError(f"{folder}: SAE architecture {architecture!r} cannot be read: {_REFUSED[architecture]}")
    if architecture not in _TENSORS:
        raise StudyError(f"{folder}: unknown SAE architecture {architecture!r}; allowed: {', '.join(_TENSORS)}")
    required = ("d_in", "d_sae") + (("k",) if "topk" in architecture else ())
    missing = [key for key in required if key not in cfg]
    if architecture == "crosscoder":
        missing += [key for key in ("widths", "scales") if key not in cfg]
    if missing:
        raise StudyError(f"{folder}: its configuration lacks {missing[0]!r}")
    _check_shapes(folder, cfg, tensors)
    _check_conventions(folder, cfg)
    sae = _from_tensors(architecture, cfg, tensors)
    sae.encoder_centred = _centred(cfg)
    normalisation = cfg.get("normalize_activations", "none")
    # With expected_average_only_in sae-lens does nothing either: the factor is folded in, or known from elsewhere.
    sae.normalisation = "none" if normalisation == "expected_average_only_in" else normalisation
    return sae.eval().requires_grad_(False)


def _centred(cfg: dict) -> bool:
    return bool(cfg.get("apply_b_dec_to_input", "transcoder" not in cfg["architecture"]))


def _check_conventions(folder: Path, cfg: dict) -> None:
    """hook_z, the values of all heads, makes no difference: rows of activations are flat here."""
    for key, allowed in (
        ("normalize_activations", (*_NORMALISATIONS, "expected_average_only_in")),
        ("reshape_activations", ("none", "hook_z")),
    ):
        if cfg.get(key, "none") not in allowed:
            raise StudyError(f"{folder}: {key} {cfg[key]!r} cannot be read; allowed: {', '.join(allowed)}")
    if _centred(cfg) and cfg.get("d_out", cfg["d_in"]) != cfg["d_in"]:
        raise StudyError(
            f"{folder}: apply_b_dec_to_input is true, but b_dec has the width of the output, not the input"
        )
    if "topk" in cfg["architecture"] and cfg["k"] not in range(1, cfg["d_sae"] + 1):
        raise StudyError(f"{folder}: k {cfg['k']!r} is no number from 1 to d_sae={cfg['d_sae']}")


def _check_shapes(folder: Path, cfg: dict, tensors: Tensors) -> None:
    d_in, d_sae, d_out = cfg["d_in"], cfg["d_sae"], cfg.get("d_out", cfg["d_in"])
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(_TENSORS[cfg["architecture"]], (d_sae,))
    if "W_skip" in shapes:
        shapes["W_skip"] = (d_out, d_in)
    unknown = sorted(tensors.keys() - shapes.keys())
    if unknown:
        raise StudyError(
            f"{folder}: {unknown[0]} is no tensor of a {cfg['architecture']} dictionary: {', '.join(shapes)}"
        )
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise StudyError(f"{folder}: {name} should have shape {shape}, found {found}")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise StudyError(f"{folder}: {name} holds values that are not finite")


@torch.no_grad()
def _from_tensors(architecture: str, cfg: dict, tensors: Tensors) -> SAE:
    d_in, d_sae, d_out = cfg["d_in"], cfg["d_sae"], cfg.get("d_out", cfg["d_in"])
    sae: SAE
    if architecture == "topk":
        sae = TopKSAE(d_in, d_sae, TopKSettings(k=cfg["k"], **_UNUSED))
        if cfg.get("rescale_acts_by_decoder_norm"):
            norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-8)
            tensors = tensors | {
                "W_enc": tensors["W_enc"] * norms,
                "b_enc": tensors["b_enc"] * norms,
                "W_dec": tensors["W_dec"] / norms[:, None],
            }
    elif architecture == "standard":
        sae = StandardSAE(d_in, d_sae, ReluL1Settings(l1_coefficient=1.0))
    elif architecture == "gated":
        sae = GatedSAE(d_in, d_sae, GatedSettings(l1_coefficient=1.0))
        tensors = tensors | {"b_enc": tensors["b_gate"]}
    elif architecture == "jumprelu":
        sae = JumpReLUSAE(d_in, d_sae, JumpReLUSettings(l0_coefficient=1.0, bandwidth=1.0, initial_threshold=1.0))
        sae.fixed_threshold = tensors["threshold"].clamp_min(0)
    elif architecture == "crosscoder":
        sae = Crosscoder(cfg["widths"], d_sae, CrosscoderSettings(k=1, **_UNUSED))
        sae.scales = cfg["scales"]
    elif architecture == "ranked_topk":
        sae = RankedTopKSAE(d_in, d_sae, TopKSettings(k=cfg["k"], **_UNUSED))
    elif architecture in ("topk_transcoder", "topk_skip_transcoder"):
        sae = TopKTranscoder(d_in, d_sae, TopKSettings(k=cfg["k"], **_UNUSED), d_out, "skip" in architecture)
    else:
        settings = TranscoderSettings(k=1, input="", target="", skip="skip" in architecture, **_UNUSED)
        sae = Transcoder(d_in, d_sae, settings, d_out)
    if isinstance(sae, BatchTopKSAE):
        sae.threshold = tensors.get("threshold", torch.zeros(d_sae)).clamp_min(0)
    if isinstance(sae, RankedTopKSAE):
        sae.rank = tensors["rank"]
    for name, parameter in sae.named_parameters():
        if name != "log_threshold":
            parameter.copy_(tensors[name])
    return sae
