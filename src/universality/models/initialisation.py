"""Freshly drawn weights: what training begins with, and what an untrained model has."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from universality.corpus.tokenizer import load_tokenizer
from universality.errors import StudyError
from universality.models.checkpoints import check_shape
from universality.models.settings import UntrainedModel
from universality.storage import replacing


def initialised(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model in float32 with the weights that transformers draws for its family; the same for the same seed."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def write_untrained(name: str, model: UntrainedModel, like: Path, out: Path) -> None:
    """Write to `out` a model with the config and the tokenizer of the model folder `like`, its weights drawn anew.

    Raises StudyError naming the model if `like` cannot be read or is of another family, depth or width than the study
    says.
    """
    where = f"models.zoo.{name} (like {like})"
    try:
        config = AutoConfig.from_pretrained(like, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library raises many kinds, each with pages of text
        reason = " ".join(str(error).split())[:200]
        raise StudyError(f"{where}: not a readable model folder: {reason}") from None
    hf = initialised(config, model.seed)
    check_shape(hf, model, where)
    tokenizer = load_tokenizer(like)
    with replacing(out) as folder:
        hf.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
