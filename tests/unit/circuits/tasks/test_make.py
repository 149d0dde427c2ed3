import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from tests.conftest import LENGTH
from universality.circuits.tasks import ioi
from universality.circuits.tasks.make import make
from universality.circuits.tasks.settings import (
    AnyTask,
    InductionSettings,
    IOISettings,
    NaturalInductionSettings,
    RecallSettings,
)
from universality.corpus.packing import write_tokens
from universality.corpus.tokens import read_tokens
from universality.errors import StudyError
from universality.settings import Settings, parse

EVERY_KIND = [
    InductionSettings(length=LENGTH),
    NaturalInductionSettings(length=LENGTH),
    RecallSettings(pairs=3, filler=2),
    IOISettings(names="random_tokens"),
]


@pytest.fixture(scope="module")
def longer(corpus, tmp_path_factory):
    """The corpus in sequences that are long enough for a sentence in a vocabulary of 300."""
    out = tmp_path_factory.mktemp("longer") / "tokens"
    write_tokens(corpus / "documents.parquet", corpus / "tokenizer", 80, out)
    return read_tokens(out, "evaluation")


@pytest.mark.parametrize("settings", EVERY_KIND, ids=lambda s: s.kind)
def test_what_holds_for_every_task(corpus, longer, settings):
    task = make(settings, 40, longer, corpus / "tokenizer", seed=3)
    rows = torch.arange(40)
    everything = [task.clean, *task.corrupted.values()]
    assert {prompts.shape for prompts in everything} == {(40, task.clean.shape[1])}
    for prompts in [*everything, task.answer, task.distractor, *task.positions.values()]:
        assert prompts.dtype == torch.int64
    for prompts in everything:
        assert (prompts[:, 0] == longer.end_of_text).all()
        assert torch.equal(prompts[:, -1], task.clean[:, -1])
        assert prompts.min() >= 0
        assert prompts.max() < longer.vocab_size
    for prompts in task.corrupted.values():
        assert (prompts != task.clean).any(dim=1).all()
    assert (task.answer != task.distractor).all()
    assert (task.clean == task.answer[:, None]).sum(dim=1).eq(1).all()
    for places in task.positions.values():
        assert ((places > 0) & (places < task.clean.shape[1] - 1)).all()
    answer_place = task.positions[{"recall": "value", "ioi": "IO"}.get(settings.kind, "B")]
    assert torch.equal(task.clean[rows, answer_place], task.answer)


@pytest.mark.parametrize("settings", EVERY_KIND, ids=lambda s: s.kind)
def test_the_same_seed_gives_the_same_bytes(corpus, longer, settings):
    def tensors(seed):
        task = make(settings, 12, longer, corpus / "tokenizer", seed)
        return [task.clean, *task.corrupted.values(), task.answer, task.distractor, *task.positions.values()]

    assert all(torch.equal(a, b) for a, b in zip(tensors(1), tensors(1), strict=True))
    assert not torch.equal(tensors(1)[0], tensors(2)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (InductionSettings(length=17), r"circuits\.tasks\.induction\.length: 17 is more than corpus\.sequence_len"),
        (NaturalInductionSettings(length=17), r"natural_induction\.length: 17 is more than corpus\.sequence_length=16"),
        (RecallSettings(pairs=8), r"circuits\.tasks\.recall: length: 18 is more than corpus\.sequence_length=16"),
        (IOISettings(names="random_tokens"), r"circuits\.tasks\.ioi: the shortest prompt has \d\d tokens .*length=16"),
    ],
    ids=lambda x: getattr(x, "kind", ""),
)
def test_prompts_beyond_the_trained_length_are_an_error(corpus, settings, message):
    with pytest.raises(StudyError, match=message):
        make(settings, 4, read_tokens(corpus / "tokens", "evaluation"), corpus / "tokenizer", 0)


def test_a_tokenizer_without_names_is_an_error_that_says_what_to_do(corpus, longer):
    with pytest.raises(StudyError, match=r"my\.key\.names: tokenizer finds 0 of \d+ first names .* use random_tokens"):
        make(IOISettings(), 4, longer, corpus / "tokenizer", 0, key="my.key")


def test_another_tokenizer_than_that_of_the_tokens_is_an_error(corpus, longer):
    with pytest.raises(StudyError, match="small: is not the tokenizer that the held-out tokens were made with"):
        make(IOISettings(names="random_tokens"), 4, longer, corpus / "other_tokenizers" / "small", 0)


@pytest.mark.parametrize("settings", EVERY_KIND[:3], ids=lambda s: s.kind)
def test_a_vocabulary_that_is_too_small_is_an_error(corpus, longer, settings):
    few = longer._replace(vocab_size=6, tokens=np.full((3, 20), longer.end_of_text))
    few.tokens[:, ::2] = 1
    with pytest.raises(StudyError, match=rf"circuits\.tasks\.{settings.kind}.*vocabulary('s 5| has 5)"):
        make(settings, 4, few, corpus / "tokenizer", 0)


class Section(Settings):
    task: AnyTask


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "iou"}, "task.kind: 'iou' is unknown; allowed: 'induction', 'natural_induction', 'recall', 'ioi'"),
        ({"kind": "induction", "length": 7}, "task.length: 7 is not allowed"),
        ({"kind": "induction", "length": 12, "position": 10}, "task: position: 10 is out of range: length=12 allows 1"),
        ({"kind": "natural_induction", "length": 12, "distance": 10}, "task: distance: 10 is out of range: length=12"),
        ({"kind": "induction", "length": 12, "position": 2, "distance": 3}, "position=2 and distance=3: give one"),
        ({"kind": "recall", "pairs": 1}, "task.pairs: 1 is not allowed"),
        ({"kind": "recall", "pairs": 3, "queried": 3}, "task: queried: 3 is out of range: pairs=3 has 0 to 2"),
        ({"kind": "recall", "pairs": 3, "length": 7}, "task: length: 7 is too short: pairs=3 needs at least 8"),
        ({"kind": "recall", "pairs": 3, "length": 9, "filler": 1}, "filler=1 and length=9: give one"),
        ({"kind": "ioi", "names": "bytes"}, "task.names: 'bytes' is not allowed"),
    ],
)
def test_impossible_settings_are_one_line_that_names_the_key(task, message):
    with pytest.raises(StudyError) as error:
        parse(Section, {"task": task}, "circuits")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_range_of_places_is_what_the_prompts_allow():
    adapter = TypeAdapter(AnyTask)
    for name in ("position", "distance"):
        assert adapter.validate_python({"kind": "induction", "length": 12, name: 9})
        with pytest.raises(ValidationError):
            adapter.validate_python({"kind": "induction", "length": 12, name: 10})


def test_every_sentence_asks_for_a_name():
    for template in ioi.TEMPLATES:
        assert template.count(" @") == template.count("@") == 3
        assert template.endswith(" to")
        assert not template.startswith("@")
    assert len(set(ioi.NAMES)) == len(ioi.NAMES)
