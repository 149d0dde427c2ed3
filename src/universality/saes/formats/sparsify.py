"""Dictionaries of sparsify (github.com/EleutherAI/sparsify): a folder with cfg.json and sae.safetensors, one for each
hook point in the folder of a run, whose config.json tells what they were trained on.

    codes = the k largest of relu((x - b_dec) @ W_enc + b_enc)         of x alone if `transcode`
    y_hat = codes @ W_dec + b_dec  (+ x @ W_skip.T if `skip_connection`)
"""

import re
from pathlib import Path

import torch

from universality.errors import StudyError
from universality.saes.base import SAE
from universality.saes.folder import from_stored_form
from universality.saes.formats.tensors import read_safetensors, renamed
from universality.storage import read_json

CFG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_HOOK_POINT = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(\..+)?")


def read(folder: Path) -> tuple[SAE, dict]:
    """A dictionary ready to encode, and its metadata. Raises StudyError naming the file, and the key or tensor."""
    stored = read_json(folder / CFG)
    missing = [key for key in ("d_in", "k") if key not in stored]
    if missing:
        raise StudyError(f"{folder / CFG}: lacks {missing[0]!r}")
    activation = "signed topk" if stored.get("signed") else stored.get("activation", "topk")
    if activation != "topk":
        raise StudyError(f"{folder / CFG}: activation {activation!r} cannot be read; allowed: topk")
    transcode, skip = bool(stored.get("transcode")), bool(stored.get("skip_connection"))
    names = _NAMES | ({"W_skip": "W_skip"} if skip else {})
    tensors = renamed(folder / WEIGHTS, read_safetensors(folder / WEIGHTS), names)
    if transcode or skip:
        tensors["rank"] = torch.ones(tensors["W_enc"].shape[1])
    d_in = stored["d_in"]
    cfg = {
        "architecture": "topk_skip_transcoder" if skip else "topk_transcoder" if transcode else "topk",
        "d_in": d_in,
        "d_sae": stored.get("num_latents") or d_in * stored.get("expansion_factor", 32),
        "d_out": d_in,
        "k": stored["k"],
        "apply_b_dec_to_input": not transcode,
    }
    return from_stored_form(folder, cfg, tensors), _metadata(folder) | {"format": "sparsify"}


def _metadata(folder: Path) -> dict:
    """What the names of the folders and the run's config.json tell."""
    place = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder  # of runs with several seeds
    told: dict = {}
    layer = _HOOK_POINT.fullmatch(place.name)
    if layer or place.name == "embed_tokens":
        told["hf_hook_name"] = place.name
        told["hook_name"] = place.name
        if layer and not layer[2]:
            told["hook_name"] = f"blocks.{layer[1]}.hook_resid_post"
    run = read_json(place.parent / RUN) if (place.parent / RUN).is_file() else {}
    if "sae" not in run:
        return told
    names = {"model_name": "model", "dataset_path": "dataset", "context_size": "ctx_len"}
    return told | {ours: run[theirs] for ours, theirs in names.items() if theirs in run}
