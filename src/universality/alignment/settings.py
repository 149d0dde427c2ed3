"""Settings of the alignment stage."""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from universality.settings import Fraction, Name, Positive, Seed, Settings

Basis = Literal["neurons", "residual", "pca"]
"""What may stand in for an SAE's features: a block's neurons; the axes of the residual stream after it; that stream's
principal components. The sign of the latter two means nothing, so each is compared with both signs."""
SIGNED: tuple[Basis, ...] = ("residual", "pca")
Setting = Literal[
    "cross_architecture", "sae_seed", "model_seed", "untrained", "frozen_decoder", "neurons", "residual", "pca", "any"
]
"""What a comparison claims that its sides share; `any` claims nothing."""
PARTS, DECODERS, SPACES = "parts", "decoders", "spaces"
"""Folders below results/alignment, where comparisons' names stand too."""


class Side(Settings):
    """What one side of a comparison is made of: every layer of a model, seen through one SAE variant and seed or in a
    basis."""

    model: Name
    variant: Name | None = None
    seed: Seed | None = None
    basis: Basis | None = None

    @model_validator(mode="after")
    def _one_or_the_other(self):
        given = (self.variant is not None, self.seed is not None)
        if self.basis is not None and any(given):
            raise ValueError(f"{self.model} is seen in the basis {self.basis}; it takes no SAE variant or seed beside")
        if self.basis is None and not all(given):
            raise ValueError(f"{self.model} needs an SAE variant and seed, or a basis: {', '.join(get_args(Basis))}")
        return self


class Comparison(Settings):
    setting: Setting
    a: Side
    b: Side
    corpus: Name = "evaluation"
    """The held-out documents that the sides are compared on: evaluation, or a name of corpus.documents.others."""

    @model_validator(mode="after")
    def _sides_fit_the_setting(self):
        wanted = self.setting if self.setting in get_args(Basis) else None
        for side in (self.a, self.b):
            if self.setting != "any" and side.basis != wanted:
                asked = f"the basis {wanted}" if wanted else "an SAE variant and seed"
                raise ValueError(f"setting {self.setting} needs {asked} on both sides; {side.model} has something else")
        return self

    @property
    def of_saes(self) -> bool:
        """Are both sides features of SAEs?"""
        return self.a.basis is None and self.b.basis is None


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
    unmatched_below: Fraction
    """Features whose MPPC is less than this with its whole interval are listed as one model's own."""
    depth_features: Positive
    """Features of each side, drawn by bootstrap_seed, whose best partners are sought anew in each resample, for the
    interval of the depth correlation."""


class Spaces(Settings):
    """Of which comparisons whole layers are compared too, by the residual streams of their models, and how."""

    comparisons: list[Name]
    tokens: Annotated[int, Field(ge=64)]
    """About so many, of whole documents."""
    rsa_tokens: Annotated[int, Field(ge=16, le=1000)]
    """Of them, those whose pairs RSA looks at."""
    token_seed: Seed
    variance_share: Annotated[float, Field(gt=0, le=1)]
    """SVCCA keeps the fewest principal directions that hold this share of the variance,"""
    max_directions: Positive
    """but at most so many."""
    bootstrap_samples: Annotated[int, Field(ge=20)]


class AlignmentSettings(Settings):
    threads: Positive
    block_layers: Positive
    """Layers of each side that a job compares; the results do not depend on it."""
    matching: Matching
    statistics: Statistics
    spaces: Spaces
    comparisons: Annotated[dict[Name, Comparison], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_fit(self):
        for name in (PARTS, DECODERS, SPACES):
            if name in self.comparisons:
                raise ValueError(f"comparisons.{name}: results/alignment has a folder of that name; choose another")
        for name in self.spaces.comparisons:
            if name not in self.comparisons:
                raise ValueError(f"spaces.comparisons: {name!r} is not in comparisons: {', '.join(self.comparisons)}")
            if self.comparisons[name].a.model == self.comparisons[name].b.model:
                raise ValueError(f"spaces.comparisons: {name} is of one model, whose layers are equal to themselves")
        return self


class MatchJob(Settings):
    """One of alignment.comparisons, the layers of its sides that a job compares, and alignment.matching."""

    comparison: Comparison
    layers_a: list[int]
    layers_b: list[int]
    matching: Matching
