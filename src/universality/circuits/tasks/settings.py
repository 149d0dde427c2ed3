"""Settings of the circuits stage's tasks, one class a kind."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from universality.settings import Positive, Settings


class _Repetition(Settings):
    """... A B ... A: where the first A stands is fixed by `position` or by `distance`, or else drawn."""

    length: Annotated[int, Field(ge=8)]
    """Tokens a prompt, the leading end-of-text token included; at most corpus.sequence_length."""
    position: Positive | None = None
    """Of the first A; 0 is the end-of-text token. Uniform in the first half if this and `distance` are left out."""
    distance: Positive | None = None
    """Tokens from B to the last A."""

    @model_validator(mode="after")
    def _pair_is_inside(self):
        if self.position is not None and self.distance is not None:
            raise ValueError(
                f"position={self.position} and distance={self.distance}: give one; with length={self.length} the other "
                "follows"
            )
        for name in ("position", "distance"):
            value = getattr(self, name)
            if value is not None and value > self.length - 3:
                raise ValueError(f"{name}: {value} is out of range: length={self.length} allows 1 to {self.length - 3}")
        return self


class InductionSettings(_Repetition):
    """Induction on distinct random tokens."""

    kind: Literal["induction"] = "induction"


class NaturalInductionSettings(_Repetition):
    """Induction on a pair of tokens planted in held-out text."""

    kind: Literal["natural_induction"] = "natural_induction"


class RecallSettings(Settings):
    """In-context recall: which value did the key come with?"""

    kind: Literal["recall"] = "recall"
    pairs: Annotated[int, Field(ge=2)]
    queried: Annotated[int, Field(ge=0)] | None = None
    """Number of the pair that is asked for, the first is 0; uniform if left out."""
    filler: Annotated[int, Field(ge=0)] | None = None
    """Random tokens between the last pair and the question; none if this and `length` are left out."""
    length: Positive | None = None
    """Tokens a prompt, the leading end-of-text token included, instead of `filler`."""
    distractor: Literal["absent", "other_value"] = "absent"
    """What the answer is set against: a token that is not in the prompt, which replace_value puts in, or another pair's
    value, which swap_values does."""

    @model_validator(mode="after")
    def _pairs_fit(self):
        if self.queried is not None and self.queried >= self.pairs:
            raise ValueError(f"queried: {self.queried} is out of range: pairs={self.pairs} has 0 to {self.pairs - 1}")
        if self.length is not None:
            if self.filler is not None:
                raise ValueError(f"filler={self.filler} and length={self.length}: give one, the other follows")
            if self.length < self.without_filler:
                raise ValueError(
                    f"length: {self.length} is too short: pairs={self.pairs} needs at least {self.without_filler}"
                )
        return self

    @property
    def without_filler(self) -> int:
        """Tokens of the shortest prompt: end-of-text token, pairs, queried key."""
        return 2 * self.pairs + 2

    @property
    def n_filler(self) -> int:
        return self.length - self.without_filler if self.length is not None else self.filler or 0


class IOISettings(Settings):
    """Indirect object identification."""

    kind: Literal["ioi"] = "ioi"
    names: Literal["tokenizer", "random_tokens"] = "tokenizer"
    """English first names that are one token each, of which not every tokenizer has enough; or, in their place, random
    tokens of the vocabulary."""


REPETITIONS = ("induction", "natural_induction")
"""Kinds in which A and B come, and then A again."""
AnyTask = Annotated[
    InductionSettings | NaturalInductionSettings | RecallSettings | IOISettings, Field(discriminator="kind")
]
