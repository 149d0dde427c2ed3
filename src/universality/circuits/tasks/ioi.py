"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593, section 2): "When Mary and John went to the
store, John gave a drink to", and the model should say Mary.

IO is the name that stands once, S the one that stands twice, as S1 and S2. IO comes before S1 (ABBA) or after it
(BABA), either with probability 1/2. A prompt is an end-of-text token and a sentence. Sentences are drawn uniformly from
those of one length: the length, of those that fit, that most combinations of wording, place and object have with this
tokenizer; the others are left out. A name is one token, which no sentence has otherwise. Corruptions:

    replace_S2   S2 becomes IO: the answer is now S
    ABC          the three names become three others, as in the paper's p_ABC

The answer is IO, the distractor S. Places: "IO", "S1", "S1+1", "S2".
"""

from collections import Counter
from itertools import accumulate, product
from typing import Literal, NamedTuple

import numpy as np
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from universality.circuits.tasks.base import Task
from universality.errors import StudyError

NAMES = tuple(
    "Aaron Adam Alan Alex Alice Amy Andrew Angela Anna Anne Anthony Arthur Ben Brian Carl Charles Chris Daniel David "
    "Diana Edward Elizabeth Emily Emma Eric Frank Fred George Graham Guido Guy Harry Helen Henry Ian Jack James Jane "
    "Jason Jeff Jennifer Jessica Jim Joe John Jonathan Joseph Joshua Julia Karen Kate Kevin Kim Larry Laura Lisa Louis "
    "Lucy Maria Mark Martin Mary Matthew Max Michael Nicholas Oliver Paul Peter Philip Rachel Richard Robert Roger Ron "
    "Ruth Ryan Sam Sarah Scott Simon Stephen Steve Steven Susan Ted Thomas Tim Tom Tony Victoria Walter William".split()
)
PLACES = ("station", "library", "market", "office", "garden", "school", "store", "house")
OBJECTS = ("book", "drink", "letter", "key", "picture", "ticket", "cup", "ring")
# An @ is a name: the two in either order, then S again.
TEMPLATES = (
    "When @ and @ went to the PLACE, @ gave a OBJECT to",
    "When @ and @ met at the PLACE, @ handed a OBJECT to",
    "While @ and @ were at the PLACE, @ showed a OBJECT to",
    "After @ and @ had left the PLACE, @ passed a OBJECT to",
    "As @ and @ walked to the PLACE, @ offered a OBJECT to",
    "Once @ and @ came back from the PLACE, @ gave the OBJECT to",
    "Yesterday @ and @ saw a OBJECT at the PLACE. Later @ gave it to",
    "At the PLACE @ and @ found a OBJECT, and @ gave it to",
    "In the PLACE sat @ and @ with a OBJECT. Then @ gave the OBJECT to",
    "The PLACE where @ and @ work sells no OBJECT, so @ sent one to",
    "When @ and @ had talked for a while, @ said goodbye to",
    "First @ and @ looked at the OBJECT, then @ gave it to",
)
_DRAWN = 5  # names a prompt: IO, S and the three of ABC


class Sentence(NamedTuple):
    """`tokens` [L] with the leading end-of-text token; those at the three `slots` [3] are to be names'."""

    tokens: np.ndarray
    slots: np.ndarray


def make_task(
    samples: int,
    tokenizer: PreTrainedTokenizerFast,
    end_of_text: int,
    longest: int,
    seed: int,
    *,
    names: Literal["tokenizer", "random_tokens"] = "tokenizer",
    key: str = "circuits.tasks.ioi",
) -> Task:
    """Prompts of at most `longest` tokens. `names`: those of NAMES that are one token, or any tokens in their place.

    Raises StudyError, beginning with `key`, if no sentence is short enough or if too few names are one token.
    """
    sentences = find_sentences(tokenizer, end_of_text, longest, key)
    if names == "tokenizer":
        candidates = np.array(sorted(single_token_names(tokenizer).values()), dtype=np.int64)
    else:
        candidates = np.delete(np.arange(len(tokenizer)), end_of_text)
    candidates = np.setdiff1d(candidates, np.stack([s.tokens for s in sentences]))
    if len(candidates) < _DRAWN:
        what, allowed = f"{len(candidates)} of {len(NAMES)} first names that are one token", "random_tokens"
        if names == "random_tokens":
            what, allowed = f"{len(candidates)} tokens that occur in no sentence", "a larger vocabulary"
        raise StudyError(f"{key}.names: {names} finds {what} with this tokenizer, {_DRAWN} are needed; use {allowed}")
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(sentences), size=samples)
    abba = rng.integers(0, 2, size=samples) == 1
    IO, S, *others = np.stack([rng.choice(candidates, _DRAWN, replace=False) for _ in range(samples)]).T
    around = np.stack([s.tokens for s in sentences])[chosen]
    slots = np.stack([s.slots for s in sentences])[chosen]
    rows = np.arange(samples)[:, None]

    def filled(first: np.ndarray, second: np.ndarray, last: np.ndarray) -> torch.Tensor:
        prompts = around.copy()
        prompts[rows, slots] = np.stack([first, second, last], axis=1)
        return torch.from_numpy(prompts)

    first, second = np.where(abba, IO, S), np.where(abba, S, IO)
    place_IO, place_S1 = np.where(abba, slots[:, :2].T, slots[:, 1::-1].T)
    places = {"IO": place_IO, "S1": place_S1, "S1+1": place_S1 + 1, "S2": slots[:, 2]}
    return Task(
        name="ioi",
        clean=filled(first, second, S),
        corrupted={"replace_S2": filled(first, second, IO), "ABC": filled(*others)},
        answer=torch.from_numpy(IO),
        distractor=torch.from_numpy(S),
        positions={name: torch.from_numpy(place) for name, place in places.items()},
    )


def find_sentences(tokenizer: PreTrainedTokenizerFast, end_of_text: int, longest: int, key: str) -> list[Sentence]:
    """All sentences of the commonest length of at most `longest` tokens, the shorter of two as common."""
    filled = (t.replace("PLACE", p).replace("OBJECT", o) for t, p, o in product(TEMPLATES, PLACES, OBJECTS))
    plain = _plain(tokenizer)
    found = [s for text in dict.fromkeys(filled) if (s := _with_slots(plain, text, "John", end_of_text))]
    if not found:
        raise StudyError(f"{key}: this tokenizer has tokens that are of a name and of what stands beside it")
    lengths = Counter(len(s.tokens) for s in found if len(s.tokens) <= longest)
    if not lengths:
        raise StudyError(
            f"{key}: the shortest prompt has {min(len(s.tokens) for s in found)} tokens with this tokenizer, which is "
            f"more than corpus.sequence_length={longest}"
        )
    length = max(lengths, key=lambda n: (lengths[n], -n))
    return [s for s in found if len(s.tokens) == length]


def single_token_names(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Those of NAMES that are one token, together with the space before, within a sentence -> that token."""
    plain = _plain(tokenizer)
    found = {}
    for name in NAMES:
        encoding = plain.encode(f"When {name} and", add_special_tokens=False)
        inside = _tokens_of(encoding.offsets, (len("When"), len(f"When {name}")))
        if inside is not None and len(inside) == 1 and encoding.ids[inside[0]] != tokenizer.unk_token_id:
            found[name] = encoding.ids[inside[0]]
    return found


def _plain(tokenizer: PreTrainedTokenizerFast) -> tokenizers.Tokenizer:
    """The tokenizer as it encodes text alone; post-processing would cut white space off some tokenizers' offsets."""
    plain = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()
    plain.post_processor = None
    return plain


def _with_slots(plain: tokenizers.Tokenizer, text: str, name: str, end_of_text: int) -> Sentence | None:
    """The sentence with one token in the place of each name, however many the name written there is; None if names
    share tokens with the text around."""
    pieces = text.split(" @")
    ends = list(accumulate(len(piece) + len(f" {name}") for piece in pieces[:-1]))
    encoding = plain.encode(f" {name}".join(pieces), add_special_tokens=False)
    tokens, slots, done = [end_of_text], [], 0
    for end in ends:
        inside = _tokens_of(encoding.offsets, (end - len(f" {name}"), end))
        if not inside:
            return None
        tokens += encoding.ids[done : inside[0]]
        slots.append(len(tokens))
        tokens.append(end_of_text)
        done = inside[-1] + 1
    return Sentence(np.array(tokens + encoding.ids[done:], dtype=np.int64), np.array(slots))


def _tokens_of(offsets: list[tuple[int, int]], span: tuple[int, int]) -> list[int] | None:
    """The tokens that are of characters of the span; None if one is of others too."""
    start, end = span
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
    return inside if all(offsets[i][0] >= start and offsets[i][1] <= end for i in inside) else None
