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
from universality.analysis.held_out import Marked
from universality.runtime import progress

_WORDS = 20  # of an explanation
_SYSTEM = "You study features of a language model. Answer with one JSON object and nothing else."
_RATE = """A feature is active at the tokens between << and >> in these texts:

{texts}

Rate it. "complexity": 1 (a single token or word) to 5 (an abstract idea that needs the whole context).
"monosemanticity": 2 if all texts show one and the same thing, else 1. "explanation": at most {words} words.
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


class Judged(NamedTuple):
    """`rating`: None if the answer was malformed; `detection`, `fuzzing`: nan likewise, without a rating, and
    where there are no texts to test on; `malformed`: how many answers were."""

    rating: Rating | None
    detection: float
    fuzzing: float
    malformed: int


class Shown(NamedTuple):
    """What is shown of a feature: `top` contexts to explain; `active` others where it fires; `silent` contexts where it
    does not; `misplaced`: of `active`, the texts with a wrong token marked."""

    top: list[Marked]
    active: list[Marked]
    silent: list[Marked]
    misplaced: list[Marked]


def rating_question(shown: Shown) -> Messages:
    return _messages(_RATE.format(words=_WORDS, texts=_numbered([context.with_marks for context in shown.top])))


class _Test(NamedTuple):
    """A question about shuffled texts, and which of them are right [n]."""

    messages: Messages
    truth: np.ndarray


def _detection(shown: Shown, explanation: str, seed: Sequence[int]) -> _Test | None:
    right, wrong = ([context.plain for context in contexts] for contexts in (shown.active, shown.silent))
    return _test(_DETECT, explanation, right, wrong, seed)


def _fuzzing(shown: Shown, explanation: str, seed: Sequence[int]) -> _Test | None:
    """Half of the texts with the right tokens marked, the others with wrong ones."""
    half = len(shown.active) // 2
    parts = shown.active[:half], shown.misplaced[-(len(shown.active) - half) :]
    right, wrong = ([context.with_marks for context in contexts] for contexts in parts)
    return _test(_FUZZ, explanation, right, wrong, seed)


_TESTS = (_detection, _fuzzing)


def _test(question: str, explanation: str, right: list[str], wrong: list[str], seed: Sequence[int]) -> _Test | None:
    """None where there is no text of one of the two kinds."""
    if not right or not wrong:
        return None
    order = np.random.default_rng(seed).permutation(len(right) + len(wrong))
    texts = [*right, *wrong]
    asked = _messages(question.format(explanation=explanation, texts=_numbered([texts[k] for k in order])))
    return _Test(asked, order < len(right))


def judge(chat: CachedChat, features: Sequence[Shown], seed: int) -> list[Judged]:
    """Every feature's, in order. What is asked that is not known yet, and what it costs at most, is said first."""
    chat.tell_cost([messages for n, shown in enumerate(features) for messages in _questions(chat, shown, [seed, n])])
    return [_judged(chat, shown, [seed, n]) for n, shown in enumerate(progress(list(features), "features judged"))]


def _questions(chat: CachedChat, shown: Shown, seed: Sequence[int]) -> list[Messages]:
    """All that is asked of a feature. An explanation that is not known yet is as many words as it may have."""
    first = rating_question(shown)
    known = chat.known(first)
    rating = parse(Rating, known) if known is not None else None
    if known is not None and rating is None:
        return [first]
    explanation = rating.explanation if rating else "words " * _WORDS
    tests = (make(shown, explanation, seed) for make in _TESTS)
    return [first, *(test.messages for test in tests if test is not None)]


def _judged(chat: CachedChat, shown: Shown, seed: Sequence[int]) -> Judged:
    rating = parse(Rating, chat.ask(rating_question(shown)))
    if rating is None:
        return Judged(None, float("nan"), float("nan"), 1)
    tests = [make(shown, rating.explanation, seed) for make in _TESTS]
    scores = [float("nan") if test is None else _score(test, chat.ask(test.messages)) for test in tests]
    malformed = sum(test is not None and np.isnan(score) for test, score in zip(tests, scores, strict=True))
    return Judged(rating, scores[0], scores[1], int(malformed))


def _score(test: _Test, answer: str) -> float:
    """Balanced accuracy; nan if the answer is malformed or names a text that there is not."""
    chosen = parse(Chosen, answer)
    if chosen is None or not all(1 <= number <= len(test.truth) for number in chosen.active):
        return float("nan")
    said = np.zeros(len(test.truth), dtype=bool)
    said[[number - 1 for number in chosen.active]] = True
    return float((said[test.truth].mean() + (~said[~test.truth]).mean()) / 2)


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
