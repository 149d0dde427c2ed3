"""Settings of the analysis stage: what kind of features are shared."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from universality.alignment.settings import MatchJob
from universality.saes.settings import EvaluationRun
from universality.settings import Fraction, Name, Positive, Seed, Settings

Layer = Annotated[int, Field(ge=0)]


class ContextsSettings(Settings):
    top: Annotated[int, Field(ge=2)]
    """Contexts where a feature fires most."""
    quantiles: Positive
    """Into how many parts its other activations are cut by their size,"""
    random: Positive
    """from each of which so many contexts are drawn."""
    seed: Seed


class TruncationSettings(Settings):
    """How many preceding tokens a feature needs, by running the model on less and less of its top contexts."""

    features: Annotated[int, Field(ge=0)]
    """Of a layer, drawn at random; 0: of none."""
    contexts: Positive
    """Of each feature."""
    seed: Seed
    batch_size: Positive


class EndpointJudge(Settings):
    """An endpoint that speaks OpenAI's chat completions: OPENAI_BASE_URL, OPENAI_API_KEY, UNIVERSALITY_JUDGE_MODEL."""

    kind: Literal["endpoint"]
    features: Positive
    """Of a layer, drawn at random."""
    tested: Positive
    """Contexts of either kind that explanations are tested on."""
    seed: Seed
    per_minute: Annotated[float, Field(gt=0)]
    timeout: Annotated[float, Field(gt=0)]
    """Seconds."""


class LocalJudge(Settings):
    """A transformers model with a chat template."""

    kind: Literal["local"]
    path: str
    features: Positive
    tested: Positive
    seed: Seed


AnyJudge = Annotated[EndpointJudge | LocalJudge, Field(discriminator="kind")]


class AgainstSettings(Settings):
    """Rank correlations of what features are with how well they are matched."""

    features: Positive
    """Of a layer, at most, drawn at random;"""
    feature_seed: Seed
    """those that truncation was measured of come first."""
    bootstrap_seed: Seed
    bootstrap_samples: Annotated[int, Field(ge=20)]
    confidence: Fraction


class IdiosyncraticSettings(Settings):
    """Features of one side only that are listed."""

    listed: Positive
    """Of a side."""
    min_documents: Positive
    """In which a feature fires, to be measured well enough."""
    contexts: Positive
    """Of each, shown and ablated in."""
    batch_size: Positive
    bootstrap_seed: Seed
    bootstrap_samples: Annotated[int, Field(ge=20)]
    confidence: Fraction


class AnalysisSettings(Settings):
    threads: Positive
    comparisons: list[Name]
    """Of alignment.comparisons: those whose features are looked at."""
    contexts: ContextsSettings
    truncation: TruncationSettings
    judge: AnyJudge | None
    """A language model to ask, if there is one."""
    against: AgainstSettings
    idiosyncratic: IdiosyncraticSettings

    @model_validator(mode="after")
    def _named_once(self):
        if len(set(self.comparisons)) < len(self.comparisons):
            raise ValueError(f"comparisons: {', '.join(self.comparisons)}: one of them is named twice")
        return self


class Held(Settings):
    """The held-out sequences that codes are of: those that activations were cached of."""

    corpus: Name
    sequences: Positive
    run: EvaluationRun


class FeaturesJob(Settings):
    """One SAE's features."""

    layer: Layer
    held: Held
    contexts: ContextsSettings
    truncation: TruncationSettings


class JudgeJob(Settings):
    """One SAE's features, as a language model sees them."""

    held: Held
    judge: AnyJudge


class SimilarityJob(MatchJob):
    """A comparison of SAEs with all its layers."""

    against: AgainstSettings


class IdiosyncraticJob(Settings):
    """One side of a comparison."""

    side: Literal["a", "b"]
    layers: Annotated[list[Layer], Field(min_length=1)]
    held: Held
    idiosyncratic: IdiosyncraticSettings
