"""Settings of the models stage."""

from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from universality.settings import Fraction, Name, Positive, Seed, Settings

STATE_SPACE_FAMILIES = ("mamba", "mamba2", "falcon_h1")


class _Model(Settings):
    family: Literal["gpt_neox", "gpt2", "llama", "mamba", "mamba2", "rwkv", "falcon_h1"]
    n_layers: Positive
    """For loaded models checked against their config; named so that the workflow is known before anything is loaded."""
    d_model: Positive
    """Width of the residual stream; likewise, so that what a study needs is known."""
    threads: Positive = 1
    """Numerical threads of the job that makes the model."""
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """The layers whose residual stream is compared; all if left out."""
    tokenizer: Name | None = None
    """A name of corpus.other_tokenizers; corpus.tokenizer if left out."""

    @model_validator(mode="after")
    def _layers_in_range(self):
        beyond = [layer for layer in self.layers or () if layer >= self.n_layers]
        if beyond:
            raise ValueError(
                f"layer {beyond[0]} is out of range: n_layers={self.n_layers} has 0 to {self.n_layers - 1}"
            )
        return self

    @property
    def compared_layers(self) -> list[int]:
        return sorted(set(self.layers)) if self.layers is not None else list(range(self.n_layers))


class TrainedModel(_Model):
    """A small model trained here on the study's corpus."""

    source: Literal["train"] = "train"
    seed: Seed
    """Draws the initial weights and every batch."""
    n_heads: Positive = 4
    """Heads of attention and of Mamba-2 (all but mamba and rwkv)."""
    n_kv_heads: Positive | None = None
    """Key and value heads (llama, falcon_h1); as many as n_heads if left out."""
    d_state: Positive = 16
    """State size N (mamba, mamba2, falcon_h1)."""
    steps: Positive
    batch_size: Annotated[int, Field(ge=2)]
    learning_rate: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.family not in ("mamba", "rwkv") and self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model={self.d_model} must be a multiple of 2 * n_heads={2 * self.n_heads}")
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")
        if self.family == "rwkv" and self.n_layers < 2:
            raise ValueError(f"n_layers={self.n_layers}: rwkv needs at least 2")
        return self


class FolderModel(_Model):
    """A local folder: transformers' format, or state-spaces' own for Mamba."""

    source: Literal["folder"] = "folder"
    path: str


class HubModel(_Model):
    """A model of the Hugging Face hub, or of its local cache."""

    source: Literal["hub"] = "hub"
    name: str
    revision: str = "main"


class UntrainedModel(_Model):
    """Another model's architecture with freshly drawn weights: a control for what comparisons find of trained ones."""

    source: Literal["untrained"] = "untrained"
    like: Name
    """The trained or loaded model whose config and tokenizer it has. In a zoo, family, n_layers and d_model are that
    model's, and so are layers and tokenizer if left out."""
    seed: Seed
    """Draws the weights."""


AnyModel = Annotated[TrainedModel | FolderModel | HubModel | UntrainedModel, Field(discriminator="source")]


class TrainingSettings(Settings):
    """What all models trained here share."""

    repeat_fraction: Annotated[float, Field(ge=0, lt=1)]
    """Share of each batch that repeats random segments, from which induction is learned; the rest is text."""
    uniform_fraction: Annotated[float, Field(ge=0, le=1)]
    """Share of the repeated segments whose tokens are uniform; the others' follow the corpus's own frequencies."""
    shuffled_fraction: Annotated[float, Field(ge=0, le=1)]
    """Share of the repeated segments whose later copies are its pairs of tokens in ever new orders."""
    min_segment: Annotated[int, Field(ge=2)]
    min_induction_gain: float
    """Nats by which repetition must raise the right token's mean log-probability; training that ends below it fails."""
    warmup_fraction: Fraction
    decay_fraction: Fraction
    weight_decay: Annotated[float, Field(ge=0)]
    evaluation_sequences: Positive
    """Sequences that each point of the training curves is measured on."""
    checkpoint_steps: Positive
    """Steps between checkpoints, from which an interrupted training goes on, and between points of the curves."""


class ModelsSettings(Settings):
    training: TrainingSettings
    zoo: Annotated[dict[Name, AnyModel], Field(min_length=1)]

    @field_validator("zoo", mode="wrap")
    @classmethod
    def _untrained_models_are_like_others(cls, zoo, validated):
        """The others first: what is wrong with one of them is told of it alone."""
        if not isinstance(zoo, dict):
            return validated(zoo)
        untrained = {name: m for name, m in zoo.items() if isinstance(m, dict) and m.get("source") == "untrained"}
        others = {name: model for name, model in zoo.items() if name not in untrained}
        others = validated(others) if others else {}
        return validated(zoo | {name: _like_another(name, model, others) for name, model in untrained.items()})


def _like_another(name: str, model: dict, others: dict[str, AnyModel]) -> dict:
    """Settings of an untrained model as they were read, and with them what follows from the one that it is like."""
    like = model.get("like")
    if not isinstance(like, str) or like not in others:
        known = ", ".join(others) or "none"
        raise _refusal(name, "like", f"{like!r} is no trained or loaded model of models.zoo; allowed: {known}")
    other = others[like]
    for key in ("family", "n_layers", "d_model"):
        value = getattr(other, key)
        if model.get(key, value) != value:
            raise _refusal(name, key, f"{model[key]!r} is not that of {like}, {value!r}; it may be left out")
    return other.model_dump(include={"family", "n_layers", "d_model", "layers", "tokenizer"}) | model


def _refusal(name: str, key: str, problem: str) -> ValidationError:
    """Of a key of one model of the zoo."""
    error = PydanticCustomError("value_error", "{problem}", {"problem": problem})
    return ValidationError.from_exception_data("zoo", [{"type": error, "loc": (name, key), "input": None}])
