"""Settings of the ablation of well and badly matched features."""

from typing import Annotated, Literal

from pydantic import Field

from universality.settings import Fraction, Positive, Seed, Settings


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
