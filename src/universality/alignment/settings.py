"""Settings of the alignment stage."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from universality.settings import Fraction, Name, Positive, Seed, Settings

Setting = Literal["cross_architecture", "sae_seed", "model_seed", "untrained", "frozen_decoder", "neurons"]
PARTS = "parts"
"""The folder below results/alignment where comparisons' names would stand."""


class Side(Settings):
    """What one side of a comparison is made of: every layer of a model, seen through one SAE variant and seed."""

    model: Name
    variant: Name | None = None
    seed: Seed | None = None
    """Variant and seed are left out where neurons are compared."""


class Comparison(Settings):
    setting: Setting
    a: Side
    b: Side
    corpus: Name = "evaluation"
    """The held-out documents that the sides are compared on: evaluation, or a name of corpus.documents.others."""

    @model_validator(mode="after")
    def _sides_fit_the_setting(self):
        for side in (self.a, self.b):
            given = (side.variant is not None, side.seed is not None)
            if self.setting == "neurons" and any(given):
                raise ValueError(f"a comparison of neurons takes no SAE variant or seed, but {side.model} has one")
            if self.setting != "neurons" and not all(given):
                raise ValueError(
                    f"{side.model} needs an SAE variant and seed in a comparison of setting {self.setting}"
                )
        return self


class Matching(Settings):
    """What is looked for in the tokens."""

    partners: Positive
    """Best partners kept of each feature."""
    token_shares: list[Fraction]
    """Shares of the tokens on which MPPC is computed too; a half, which partners are chosen on, always is."""
    order_seed: Seed
    """Draws the order of documents, and with it their halves."""
    rotations: Positive
    """Rotations of the documents that the null is computed for."""
    null_share: Annotated[float, Field(gt=0, le=1)]
    """Share of each layer's features that it is computed for."""
    null_seed: Seed
    max_groups: Annotated[int, Field(ge=8)]
    """With more documents than this, the bootstrap draws groups of them."""


class Statistics(Settings):
    bootstrap_seed: Seed
    bootstrap_samples: Annotated[int, Field(ge=20)]
    """Resamples of the evaluation documents, from which the intervals come."""
    confidence: Fraction
    null_neighbours: Positive
    """Features of about equal frequency whose null maxima a feature is compared with."""
    false_discovery_rate: Fraction
    thresholds: Annotated[list[Fraction], Field(min_length=1)]
    """Correlations from which on features count as matched."""


class AlignmentSettings(Settings):
    threads: Positive
    block_layers: Positive
    """Layers of each side that a job compares; the results do not depend on it."""
    matching: Matching
    statistics: Statistics
    comparisons: Annotated[dict[Name, Comparison], Field(min_length=1)]

    @model_validator(mode="after")
    def _no_comparison_takes_the_folder_of_parts(self):
        if PARTS in self.comparisons:
            raise ValueError(f"comparisons.{PARTS}: results/alignment keeps parts under that name; choose another")
        return self
