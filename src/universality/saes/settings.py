"""Settings of the saes stage."""

from typing import Annotated, Literal

from pydantic import Field

from universality.settings import Name, Positive, Settings


class TopKSettings(Settings):
    architecture: Literal["topk"] = "topk"
    k: Positive
    """Features kept for each token."""
    k_aux: Positive
    """Dead features that reconstruct the error in the auxiliary loss."""
    aux_coefficient: Annotated[float, Field(ge=0)]
    dead_steps: Positive
    """A feature counts as dead in training after this many steps without firing."""


class ReluL1Settings(Settings):
    architecture: Literal["standard"] = "standard"
    l1_coefficient: Annotated[float, Field(gt=0)]
    """Weight of the L1 penalty on inputs scaled to mean norm sqrt(d_in)."""


Variant = Annotated[TopKSettings | ReluL1Settings, Field(discriminator="architecture")]


class SAETraining(Settings):
    d_sae: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(ge=2)]
    steps: Positive
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps over which the learning rate, and the L1 penalty, rise to their values."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)]
    """Share of the steps, the last ones, over which the learning rate falls to nothing."""


class SAEsSettings(Settings):
    threads: Positive
    training: SAETraining
    variants: Annotated[dict[Name, Variant], Field(min_length=1)]
