"""Settings of the alignment stage."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from universality.settings import Fraction, Name, Positive, Seed, Settings

Setting = Literal["cross_architecture", "sae_seed", "model_seed", "shuffled", "neurons"]


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


class Statistics(Settings):
    bootstrap_seed: Seed
    bootstrap_samples: Annotated[int, Field(ge=20)]
    """Resamples of the evaluation documents, from which the intervals come."""
    confidence: Fraction
    shuffle_seed: Seed
    """Permutes the tokens of side b in comparisons of setting shuffled."""


class AlignmentSettings(Settings):
    threads: Positive
    statistics: Statistics
    comparisons: Annotated[dict[Name, Comparison], Field(min_length=1)]
