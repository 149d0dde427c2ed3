"""From settings to a dictionary of the right variant."""

import torch

from universality.errors import StudyError
from universality.saes.base import SAE
from universality.saes.batch_topk import BatchTopKSAE
from universality.saes.crosscoder import Crosscoder
from universality.saes.gated import GatedSAE
from universality.saes.jumprelu import JumpReLUSAE
from universality.saes.matryoshka import MatryoshkaSAE
from universality.saes.settings import AnyVariant, CrosscoderSettings, TranscoderSettings, too_few_features
from universality.saes.standard import StandardSAE
from universality.saes.topk import TopKSAE
from universality.saes.transcoder import Transcoder

SAES: dict[str, type] = {
    kind.architecture: kind for kind in (StandardSAE, TopKSAE, BatchTopKSAE, MatryoshkaSAE, JumpReLUSAE, GatedSAE)
}


def build_sae(variant: AnyVariant, d_sae: int, widths: list[int]) -> SAE:
    """A dictionary of zeros for sites of these widths: one; a transcoder's input and target; all of a crosscoder.

    Raises StudyError if the variant asks for more features than there are.
    """
    problem = too_few_features(variant, d_sae)
    if problem:
        raise StudyError(f"{variant.architecture} {problem}")
    due = {"transcoder": "2 sites", "crosscoder": "2 sites or more"}.get(variant.architecture, "1 site")
    enough = len(widths) == int(due[0]) or (variant.architecture == "crosscoder" and len(widths) > 2)
    if not enough:
        raise StudyError(f"{variant.architecture}: is of {due}, but {len(widths)} were given")
    sae: SAE
    if isinstance(variant, TranscoderSettings):
        sae = Transcoder(widths[0], d_sae, variant, widths[1])
    elif isinstance(variant, CrosscoderSettings):
        sae = Crosscoder(widths, d_sae, variant)
    else:
        sae = SAES[variant.architecture](widths[0], d_sae, variant)
    if variant.frozen_decoder:
        sae.freeze_decoder()
    return sae


def initial_sae(variant: AnyVariant, d_sae: int, widths: list[int], mean: torch.Tensor, seed: int) -> SAE:
    """One with random weights drawn from the seed; `mean` [d_out] is that of what it reconstructs."""
    sae = build_sae(variant, d_sae, widths)
    sae.initialise(mean, torch.Generator().manual_seed(seed))
    return sae.train()
