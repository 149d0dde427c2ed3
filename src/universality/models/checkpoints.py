"""Bring a model from elsewhere into the study: a local folder or a hub name becomes a transformers folder of ours.

Two formats are read: transformers' own, and state-spaces' for Mamba and Mamba-2 (config.json with d_model and n_layer,
pytorch_model.bin). Weights are read without running any code from the checkpoint, and written as safetensors.
"""

import pickle
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from universality.corpus.tokenizer import identity, load_tokenizer
from universality.errors import StudyError
from universality.models.language_model import FAMILIES
from universality.models.settings import AnyModel, FolderModel, HubModel
from universality.runtime import log
from universality.storage import read_json, replacing

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def import_model(name: str, model: FolderModel | HubModel, tokenizer_folder: Path, out: Path) -> None:
    """Check the model against its settings and the tokenizer that the study has for it, and write it to `out`.

    Raises StudyError naming the model if it cannot be loaded, is of another family, depth or width, has another
    tokenizer, or has fewer embeddings than the tokenizer has tokens.
    """
    where = f"models.zoo.{name} ({model.path if isinstance(model, FolderModel) else model.name})"
    hf = _load(model, where)
    check_shape(hf, model, where)
    tokenizer = load_tokenizer(tokenizer_folder)
    _check_tokenizer(name, where, model, tokenizer, tokenizer_folder)
    if hf.config.vocab_size < len(tokenizer):
        raise StudyError(f"{where}: has {hf.config.vocab_size} embeddings for {len(tokenizer)} tokens")
    with replacing(out) as folder:
        hf.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)


def check_shape(hf: PreTrainedModel, model: AnyModel, where: str) -> None:
    """Raises StudyError, which begins with `where`, if `hf` is of another family, depth or width than its settings."""
    if hf.config.model_type != model.family:
        raise StudyError(f"{where}: is of family {hf.config.model_type}, the study says {model.family}")
    n_layers = len(FAMILIES[model.family].block_list(hf))
    if n_layers != model.n_layers:
        raise StudyError(f"{where}: has {n_layers} layers, the study says n_layers={model.n_layers}")
    if hf.config.hidden_size != model.d_model:
        raise StudyError(f"{where}: has width {hf.config.hidden_size}, the study says d_model={model.d_model}")


def _load(model: FolderModel | HubModel, where: str):
    if isinstance(model, FolderModel):
        folder = Path(model.path)
        if not (folder / "config.json").is_file():
            raise StudyError(f"{where}: no such folder, or no config.json in it")
        if "model_type" not in read_json(folder / "config.json"):  # transformers always names it
            return load_state_spaces(folder)
    name, revision = (model.path, None) if isinstance(model, FolderModel) else (model.name, model.revision)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        if config.model_type not in FAMILIES:
            raise StudyError(f"{where}: family {config.model_type!r} is unknown; allowed: {', '.join(FAMILIES)}")
        hf, loading = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except StudyError:
        raise
    except Exception as error:  # the library raises many kinds, each with pages of text
        reason = " ".join(str(error).split())[:200]
        raise StudyError(f"{where}: cannot be loaded (no such model, or no network?): {reason}") from None
    if loading["missing_keys"]:
        raise StudyError(f"{where}: the checkpoint lacks {sorted(loading['missing_keys'])[0]!r}")
    return hf


def _check_tokenizer(name: str, where: str, model: FolderModel | HubModel, tokenizer, tokenizer_folder: Path) -> None:
    source, revision = (model.path, None) if isinstance(model, FolderModel) else (model.name, model.revision)
    if isinstance(model, FolderModel) and not any((Path(source) / file).is_file() for file in _TOKENIZER_FILES):
        log.warning("%s: brings no tokenizer; taken to have been trained with the one that the study has for it", where)
        return
    own = load_tokenizer(source, revision)
    if identity(own) != identity(tokenizer):
        origin = read_json(tokenizer_folder / "origin.json")["origin"]
        raise StudyError(
            f"{where}: its tokenizer ({len(own)} tokens) is not that of {origin} ({len(tokenizer)} tokens); "
            f"name it in corpus.other_tokenizers and as models.zoo.{name}.tokenizer"
        )


def load_state_spaces(folder: Path) -> MambaForCausalLM | Mamba2ForCausalLM:
    """A Mamba or Mamba-2 in state-spaces' own format.

    Raises StudyError naming the file or the first tensor that does not fit.
    """
    native = read_json(folder / "config.json")
    if not {"d_model", "n_layer"} <= native.keys():
        raise StudyError(f"{folder / 'config.json'}: has neither model_type (transformers) nor d_model and n_layer")
    weights_file = folder / "pytorch_model.bin"
    try:
        weights = torch.load(weights_file, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise StudyError(f"{weights_file}: cannot be read: {' '.join(str(error).split())[:160]}") from None
    embedding = weights.get("backbone.embedding.weight") if isinstance(weights, dict) else None
    if embedding is None:
        raise StudyError(f"{weights_file}: lacks 'backbone.embedding.weight'; not a state-spaces Mamba checkpoint")
    config = _native_config(native, embedding.shape[0])
    renamed = {key.replace("backbone.embedding.", "backbone.embeddings."): value for key, value in weights.items()}
    hf = MambaForCausalLM(config) if isinstance(config, MambaConfig) else Mamba2ForCausalLM(config)
    try:
        missing, unexpected = hf.load_state_dict(renamed, strict=False)
    except RuntimeError as error:
        raise StudyError(
            f"{weights_file}: does not fit its config.json: {' '.join(str(error).split())[:200]}"
        ) from None
    missing = [key for key in missing if key != "lm_head.weight" or not config.tie_word_embeddings]
    if missing or unexpected:
        raise StudyError(
            f"{weights_file}: does not fit its config.json: {(missing + unexpected)[0]!r} is missing or extra"
        )
    hf.tie_weights()
    return hf.float().eval()


def _native_config(native: dict, vocab_size: int) -> MambaConfig | Mamba2Config:
    """transformers' config for state-spaces' one; defaults are those of its code. The vocabulary is the padded one."""
    ssm = native.get("ssm_cfg") or {}
    expand = ssm.get("expand", 2)
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": native["d_model"],
        "num_hidden_layers": native["n_layer"],
        "conv_kernel": ssm.get("d_conv", 4),
        "expand": expand,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": native.get("tie_embeddings", True),
        "use_cache": False,
    }
    if ssm.get("layer", "Mamba1") == "Mamba1":
        return MambaConfig(**shared, state_size=ssm.get("d_state", 16))
    if ssm["layer"] != "Mamba2":
        raise StudyError(f"config.json: ssm_cfg.layer is {ssm['layer']!r}; allowed: Mamba1, Mamba2")
    head_dim = ssm.get("headdim", 64)
    return Mamba2Config(
        **shared,
        state_size=ssm.get("d_state", 128),
        head_dim=head_dim,
        num_heads=expand * native["d_model"] // head_dim,
        n_groups=ssm.get("ngroups", 1),
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
