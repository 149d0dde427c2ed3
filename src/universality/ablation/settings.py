"""Settings of the ablation stage: well and badly matched features."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from universality.circuits.settings import Measuring
from universality.circuits.tasks.settings import AnyTask
from universality.saes.settings import EvaluationRun
from universality.settings import Fraction, Name, Positive, Seed, Settings

LOSS = "loss"
"""What stands in the tables' column `what` for the loss, where else a task's name does."""


class FeatureAblationSettings(Settings):
    quantile: Annotated[float, Field(gt=0, le=1 / 3)]
    """Share of a layer's live features that counts as well matched, and as badly matched; a third stays between."""
    caliper: Annotated[float, Field(gt=0)]
    """How far apart the log frequencies, and the log norms, of a pair may be, in standard deviations over the layer's
    live features; 0.2 is usual (Austin 2011)."""
    sizes: Annotated[list[Positive | Fraction], Field(min_length=1)]
    """Features of a layer that are ablated at once: a number, or a share of the live ones; at most as many as found
    a partner."""
    order: Literal["norm", "random"]
    """Which pairs smaller sizes take: those whose ablation removes most, or any."""
    group_seed: Seed
    """Draws the reference features, and the order of pairs where it is random."""
    batch_size: Positive
    bootstrap_seed: Seed
    bootstrap_samples: Annotated[int, Field(ge=20)]
    confidence: Fraction


class AblationSettings(Settings):
    threads: Positive
    comparisons: list[Name]
    """Of alignment.comparisons: those whose sides' features are ablated, by how well the other side matches them."""
    sequences: Positive
    """Held-out sequences that the loss is measured on."""
    features: FeatureAblationSettings

    @model_validator(mode="after")
    def _named_once(self):
        if len(set(self.comparisons)) < len(self.comparisons):
            raise ValueError(f"comparisons: {', '.join(self.comparisons)}: one of them is named twice")
        return self


class AblationJob(Settings):
    """One side of a comparison: the layers of its SAEs, what is ablated, and what it is measured on."""

    side: Literal["a", "b"]
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    corpus: Name
    sequences: Positive
    features: FeatureAblationSettings
    tasks: dict[Name, AnyTask]
    measuring: Measuring
    run: EvaluationRun
