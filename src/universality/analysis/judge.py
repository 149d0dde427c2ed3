"""What a language model says of features: complexity, monosemanticity and an explanation, and how well that explains.

As in arXiv 2410.06672 each feature gets a complexity of 1 to 5 and a monosemanticity of 1 (no) or 2 (yes), from its top
contexts. An explanation is tested on contexts that it was not made from (Paulo et al. 2024, arXiv 2410.13928):

    detection   which of these texts does the feature fire in? balanced accuracy, 0.5 by chance
    fuzzing     in which of these texts, where the feature fires in all, are the right tokens marked? likewise

An answer that is not what was asked for is counted as malformed and has no value; it is never guessed.
"""

import json
import re
from collections.abc import Sequence
from typing import Annotated, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from universality.analysis.chat import CachedChat, Messages
from universality.runtime import progress

_SYSTEM = "You study features of a language model. Answer with one JSON object and nothing else."
_RATE = """A feature is active at the tokens between << and >> in these texts:

{texts}

Rate it. "complexity": 1 (a single token or word) to 5 (an abstract idea that needs the whole context).
"monosemanticity": 2 if all texts show one and the same thing, else 1. "explanation": at most 20 words.
Answer: {{"complexity": 1-5, "monosemanticity": 1-2, "explanation": "..."}}"""
_DETECT = """A feature of a language model is described so: {explanation}

In which of these texts would it be active?

{texts}

Answer: {{"active": [numbers of those texts]}}"""
_FUZZ = """A feature of a language model is described so: {explanation}

It is active somewhere in all of these texts. In which are the tokens between << and >> those at which it is active?

{texts}

Answer: {{"active": [numbers of those texts]}}"""


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Rating(_Answer):
    complexity: Annotated[int, Field(ge=1, le=5)]
    monosemanticity: Annotated[int, Field(ge=1, le=2)]
    explanation: Annotated[str, Field(min_length=1)]


class Chosen(_Answer):
    active: list[int]


A = TypeVar("A", bound=_Answer)


class Marked(NamedTuple):
    """A context as text: `before`, the token's own text, `after`."""

    before: str
    token: str
    after: str

    @property
    def with_marks(self) -> str:
        return f"{self.before}<<{self.token}>>{self.after}"

    @property
    def plain(self) -> str:
        return f"{self.before}{self.token}{self.after}"


class Judged(NamedTuple):
    """`rating`: None if the answer was malformed; `detection`, `fuzzing`: nan likewise, or without a rating;
    `malformed`: how many answers were."""

    rating: Rating | None
    detection: float
    fuzzing: float
    malformed: int


def rating_question(top: Sequence[Marked]) -> Messages:
    return _messages(_RATE.format(texts=_numbered([context.with_marks for context in top])))


def judge(chat: CachedChat, contexts: Sequence["Shown"], seed: int) -> list[Judged]:
    """Every feature's, in order. What it costs at most is said first; detection and fuzzing need the explanations."""
    chat.tell_cost([rating_question(shown.top) for shown in contexts])
    return [_judged(chat, shown, [seed, n]) for n, shown in enumerate(progress(list(contexts), "features judged"))]


class Shown(NamedTuple):
    """What is shown of a feature: `top` contexts to explain; `active` others where it fires; `silent` contexts where it
    does not; `misplaced`: as many as `active`, the same texts with another token marked."""

    top: list[Marked]
    active: list[Marked]
    silent: list[Marked]
    misplaced: list[Marked]


def _judged(chat: CachedChat, shown: Shown, seed: Sequence[int]) -> Judged:
    rating = parse(Rating, chat.ask(rating_question(shown.top)))
    if rating is None:
        return Judged(None, float("nan"), float("nan"), 1)
    detection = _tested(
        chat, _DETECT, rating.explanation, [c.plain for c in shown.active], [c.plain for c in shown.silent], seed
    )
    half = len(shown.active) // 2
    right, wrong = shown.active[:half], shown.misplaced[half:]
    fuzzing = _tested(
        chat, _FUZZ, rating.explanation, [c.with_marks for c in right], [c.with_marks for c in wrong], seed
    )
    return Judged(rating, detection, fuzzing, int(np.isnan(detection)) + int(np.isnan(fuzzing)))


def _tested(
    chat: CachedChat, question: str, explanation: str, right: list[str], wrong: list[str], seed: Sequence[int]
) -> float:
    """Balanced accuracy of one answer over shuffled texts; nan if it is malformed or names a text that there is not."""
    order = np.random.default_rng(seed).permutation(len(right) + len(wrong))
    texts, truth = [*right, *wrong], np.arange(len(right) + len(wrong)) < len(right)
    shuffled = [texts[k] for k in order]
    answer = parse(Chosen, chat.ask(_messages(question.format(explanation=explanation, texts=_numbered(shuffled)))))
    if answer is None or not all(1 <= number <= len(texts) for number in answer.active):
        return float("nan")
    said = np.zeros(len(texts), dtype=bool)
    said[[number - 1 for number in answer.active]] = True
    truth = truth[order]
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)


def parse(kind: type[A], answer: str) -> A | None:
    """The JSON object in an answer, with or without a fence around it; None if there is none, or not of this kind."""
    found = re.fullmatch(r"\s*(?:```(?:json)?\s*)?(\{.*\})\s*(?:```)?\s*", answer, re.S)
    try:
        return kind.model_validate(json.loads(found[1])) if found else None
    except (ValidationError, json.JSONDecodeError):
        return None


def _messages(text: str) -> Messages:
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}]


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{n}. {' '.join(text.split())}" for n, text in enumerate(texts, 1))
