"""Settings of the saes stage."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from universality.activations.settings import Device, Products
from universality.settings import Fraction, Name, Positive, Seed, Settings

CROSSCODERS = "crosscoders"
"""The folder below results/saes where models' names would stand."""
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class _Variant(Settings):
    d_sae: Positive | None = None
    """Features; those of saes.training if left out."""
    learning_rate: Rate | None = None
    """Likewise."""
    frozen_decoder: bool = False
    """Do decoder rows stay at the random directions, of unit norm, that they start with? All else is trained."""


class AuxKSettings(_Variant):
    k: Positive
    """Features kept for each token."""
    k_aux: Positive
    """Dead features that reconstruct the error in the auxiliary loss."""
    aux_coefficient: Weight


class TopKSettings(AuxKSettings):
    architecture: Literal["topk"] = "topk"


class BatchTopKSettings(AuxKSettings):
    """`k` features a token on average."""

    architecture: Literal["batchtopk"] = "batchtopk"


class MatryoshkaSettings(AuxKSettings):
    architecture: Literal["matryoshka_batchtopk"] = "matryoshka_batchtopk"
    prefixes: Annotated[list[Positive], Field(min_length=1)]
    """Sizes of the nested dictionaries within the whole one, which comes on top of them."""

    @model_validator(mode="after")
    def _prefixes_grow(self):
        if sorted(set(self.prefixes)) != self.prefixes:
            raise ValueError(f"prefixes: {self.prefixes} do not grow from each one to the next")
        return self


class ResampledSettings(_Variant):
    resample_steps: Positive | None = None
    """Steps between times when dead features begin anew; never if left out."""


class ReluL1Settings(ResampledSettings):
    architecture: Literal["standard"] = "standard"
    l1_coefficient: Rate
    """Weight of the L1 penalty on inputs scaled to mean norm sqrt(d_in)."""


class GatedSettings(ResampledSettings):
    architecture: Literal["gated"] = "gated"
    l1_coefficient: Rate
    """Weight of the L1 penalty on the gates, on inputs scaled to mean norm sqrt(d_in)."""


class JumpReLUSettings(ResampledSettings):
    architecture: Literal["jumprelu"] = "jumprelu"
    l0_coefficient: Rate
    """Weight of the number of active features, on inputs scaled to mean norm sqrt(d_in)."""
    bandwidth: Rate
    """Width of the window around a threshold from which its gradient is estimated."""
    initial_threshold: Rate


class TranscoderSettings(AuxKSettings):
    """`k` features a token on average, from `input` to `target`, sites without their layer: resid_mid, mlp.out."""

    architecture: Literal["transcoder"] = "transcoder"
    input: str
    target: str
    skip: bool = False
    """Is a linear map of the input added to the output?"""


class CrosscoderSettings(AuxKSettings):
    """`k` features a token on average, for all sites together."""

    architecture: Literal["crosscoder"] = "crosscoder"

    @model_validator(mode="after")
    def _decoder_is_learned(self):
        if self.frozen_decoder:
            raise ValueError(
                "frozen_decoder: true is not for crosscoders, whose decoder tells which features models share"
            )
        return self


Variant = Annotated[
    TopKSettings | BatchTopKSettings | MatryoshkaSettings | ReluL1Settings | GatedSettings | JumpReLUSettings,
    Field(discriminator="architecture"),
]
AnyVariant = Annotated[
    TopKSettings
    | BatchTopKSettings
    | MatryoshkaSettings
    | ReluL1Settings
    | GatedSettings
    | JumpReLUSettings
    | TranscoderSettings
    | CrosscoderSettings,
    Field(discriminator="architecture"),
]


class SAETraining(Settings):
    """What all dictionaries of a study share."""

    d_sae: Positive
    learning_rate: Rate
    batch_size: Annotated[int, Field(ge=2)]
    steps: Positive
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps over which the learning rate rises to its value."""
    sparsity_warmup_steps: Annotated[int, Field(ge=0)]
    """Steps over which the weight of an L1 or L0 penalty rises to its value."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)]
    """Share of the steps, the last ones, over which the learning rate falls to nothing."""
    dead_steps: Positive
    """A feature counts as dead in training after this many steps without firing."""
    gradient_norm: Rate
    """Longest gradient that a step is made with; longer ones are scaled down to it."""
    products: Products
    """How matrices are multiplied; weights and their updates are float32. bfloat16 is quicker where the CPU has it."""
    data_seed: Seed
    """Draws the batches, the same for every SAE of a site: seeds of SAEs draw their initial weights alone."""
    checkpoint_steps: Positive
    """Steps between checkpoints, from which an interrupted training goes on."""
    log_steps: Positive
    """Steps between points of the training curves."""


class EvaluationSettings(Settings):
    """How dictionaries are measured on held-out documents."""

    sequences: Positive
    """Sequences that the model runs on with reconstructions in place; the first of the evaluation sample."""
    batch_size: Positive
    """Sequences that the model runs on at a time."""
    rows: Positive
    """Stored rows that are encoded at a time."""
    bootstrap_seed: Seed
    bootstrap_samples: Annotated[int, Field(ge=20)]
    """Resamples of the evaluation documents, from which the intervals come."""
    confidence: Fraction


class EvaluationRun(Settings):
    """What models run on in an evaluation, as they did for the stored activations."""

    sample_seed: Seed
    products: Products
    device: Device


class OneSAE(Settings):
    """SAEs of all compared layers of a model."""

    model: Name
    variant: Name
    seed: Seed


class TranscoderJob(Settings):
    """Transcoders of all compared layers of a model."""

    model: Name
    seed: Seed
    dictionary: TranscoderSettings


class CrosscoderSide(Settings):
    model: Name
    layer: Annotated[int, Field(ge=0)]


class CrosscoderJob(Settings):
    """A crosscoder of the residual stream after one layer of each of several models."""

    sides: Annotated[list[CrosscoderSide], Field(min_length=2)]
    seed: Seed
    dictionary: CrosscoderSettings


class SAEsSettings(Settings):
    threads: Positive
    training: SAETraining
    variants: Annotated[dict[Name, Variant], Field(min_length=1)]
    also: list[OneSAE]
    """SAEs to train and evaluate beside those that comparisons ask for."""
    transcoders: dict[Name, TranscoderJob]
    crosscoders: dict[Name, CrosscoderJob]
    evaluation: EvaluationSettings

    def d_sae(self, variant: AnyVariant) -> int:
        """Features that the variant's dictionaries have."""
        return variant.d_sae or self.training.d_sae


def too_few_features(variant: AnyVariant, d_sae: int) -> str | None:
    """What of the variant asks for more than `d_sae` features; None if nothing does."""
    if isinstance(variant, AuxKSettings) and variant.k > d_sae:
        return f"k: {variant.k} is more than d_sae={d_sae}"
    if isinstance(variant, MatryoshkaSettings) and variant.prefixes[-1] >= d_sae:
        return f"prefixes: {variant.prefixes} do not end below d_sae={d_sae}"
    return None
