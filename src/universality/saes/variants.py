"""From settings, or from a stored folder, to an SAE of the right variant."""

from pathlib import Path

from universality.errors import StudyError
from universality.saes.base import SAE, read_sae_folder
from universality.saes.settings import ReluL1Settings, TopKSettings, Variant
from universality.saes.standard import StandardSAE
from universality.saes.topk import TopKSAE


def build_sae(d_in: int, d_sae: int, variant: Variant) -> SAE:
    if isinstance(variant, TopKSettings):
        if variant.k > d_sae:
            raise StudyError(f"saes.variants: k={variant.k} is more than saes.training.d_sae={d_sae}")
        return TopKSAE(d_in, d_sae, variant)
    return StandardSAE(d_in, d_sae, variant)


def load_sae(folder: Path) -> SAE:
    """An SAE from a sae-lens folder, ready to encode. Raises StudyError naming the folder if it cannot be read."""
    cfg, weights = read_sae_folder(folder)
    variant: Variant
    if cfg["architecture"] == "topk":
        variant = TopKSettings(k=cfg["k"], k_aux=1, aux_coefficient=0.0, dead_steps=1)
    elif cfg["architecture"] == "standard":
        variant = ReluL1Settings(l1_coefficient=1.0)
    else:
        raise StudyError(f"{folder}: unknown SAE architecture {cfg['architecture']!r}; allowed: topk, standard")
    sae = build_sae(cfg["d_in"], cfg["d_sae"], variant)
    sae.load_state_dict(weights)
    return sae.requires_grad_(False)
