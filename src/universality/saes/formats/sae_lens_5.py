"""cfg.json as sae-lens wrote it before version 6, and many folders on the Hugging Face hub have it: all in one object.

Read as sae-lens 6 reads it: `activation_fn` topk made a TopK SAE of any architecture.
"""

from pathlib import Path

from universality.errors import StudyError

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_ACTIVATIONS = (None, "relu", "topk")
_OF_THE_SAE = (
    "architecture",
    "d_in",
    "d_sae",
    "d_out",
    "dtype",
    "device",
    "k",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "rescale_acts_by_decoder_norm",
    "activation_fn",
    "activation_fn_kwargs",
    "finetuning_scaling_factor",
)


def upgraded(path: Path, cfg: dict) -> dict:
    """`cfg`, read from `path`, in the form of version 6, which has `metadata`; unchanged where it has that already.

    Raises StudyError naming the file and the key where something is not read.
    """
    if isinstance(cfg.get("metadata"), dict):
        return cfg
    cfg = {_RENAMED.get(key, key): value for key, value in cfg.items()}
    activation = cfg.get("activation_fn")
    if activation not in _ACTIVATIONS:
        raise StudyError(f"{path}: activation_fn {activation!r} cannot be read; allowed: relu, topk")
    of_the_sae = {"architecture": "standard"} | {key: cfg[key] for key in _OF_THE_SAE if key in cfg}
    if activation == "topk":
        of_the_sae |= {"architecture": "topk"} | (cfg.get("activation_fn_kwargs") or {})
    normalisation = cfg.get("normalize_activations")
    if normalisation is None or isinstance(normalisation, bool):
        of_the_sae["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    metadata = {key: value for key, value in cfg.items() if key not in _OF_THE_SAE and value is not None}
    if "sae_lens_version" in metadata:
        metadata["sae_lens_training_version"] = metadata.pop("sae_lens_version")
    return of_the_sae | {"metadata": metadata}
