"""From the settings of a task to the task, whatever its kind."""

from pathlib import Path

from universality.circuits.tasks import induction, ioi, natural, recall
from universality.circuits.tasks.base import Task
from universality.circuits.tasks.settings import (
    AnyTask,
    InductionSettings,
    IOISettings,
    NaturalInductionSettings,
    RecallSettings,
)
from universality.corpus.tokenizer import identity, load_tokenizer
from universality.corpus.tokens import TokenSequences
from universality.errors import StudyError


def make(
    settings: AnyTask, samples: int, sequences: TokenSequences, tokenizer: Path, seed: int, key: str | None = None
) -> Task:
    """A task of `samples` prompts in the tokens of `sequences`, held-out ones, made with the `tokenizer` in a folder.

    Raises StudyError, beginning with the task's `key` in the study (circuits.tasks.{kind} if left out), if the prompts
    would be longer than the sequences, and where a task cannot be had with the vocabulary or the tokenizer.
    """
    key = key or f"circuits.tasks.{settings.kind}"
    longest = sequences.tokens.shape[1]
    vocabulary = (sequences.vocab_size, sequences.end_of_text)
    match settings:
        case InductionSettings(length=length, position=position, distance=distance):
            _check_length(length, longest, f"{key}.length")
            return induction.make_task(
                samples, length, *vocabulary, seed, position=position, distance=distance, key=f"{key}.length"
            )
        case NaturalInductionSettings(length=length, position=position, distance=distance):
            _check_length(length, longest, f"{key}.length")
            return natural.make_task(
                samples, length, sequences.tokens, *vocabulary, seed, position=position, distance=distance, key=key
            )
        case RecallSettings(pairs=pairs, queried=queried, n_filler=filler, distractor=distractor):
            _check_length(settings.without_filler + filler, longest, f"{key}: length")
            return recall.make_task(
                samples, pairs, *vocabulary, seed, queried=queried, filler=filler, distractor=distractor, key=key
            )
        case IOISettings(names=names):
            loaded = load_tokenizer(tokenizer)
            if identity(loaded) != sequences.tokenizer:
                raise StudyError(f"{tokenizer}: is not the tokenizer that the held-out tokens were made with")
            return ioi.make_task(samples, loaded, sequences.end_of_text, longest, seed, names=names, key=key)


def _check_length(length: int, longest: int, key: str) -> None:
    if length > longest:
        raise StudyError(f"{key}: {length} is more than corpus.sequence_length={longest}")
