"""Indirect object identification with tokenizers that have names."""

import itertools
from collections import Counter

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from universality.circuits.tasks.ioi import NAMES, OBJECTS, PLACES, TEMPLATES, find_sentences, make_task
from universality.circuits.tasks.ioi import single_token_names as names_of
from universality.corpus.tokenizer import END_OF_TEXT, train_bpe
from universality.errors import StudyError

KNOWN = NAMES[:40]
S = 300


def texts():
    """Sentences with names of KNOWN, so often that these become one token each."""
    names = itertools.cycle(KNOWN)
    for template, place, thing in itertools.product(TEMPLATES, PLACES, OBJECTS):
        text = template.replace("PLACE", place).replace("OBJECT", thing)
        for _ in range(3):
            text = text.replace("@", next(names), 1)
        yield text


def byte_level():
    """As GPT-2's: byte-level BPE whose post-processing cuts spaces off the offsets."""
    tokenizer = train_bpe(texts(), 520)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def metaspace():
    """As Llama's: spaces are a character of their own, one is added in front, and so is a token."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[END_OF_TEXT, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, unk_token="<unk>")


@pytest.fixture(scope="module", params=[byte_level, metaspace], ids=lambda f: f.__name__)
def tokenizer(request):
    return request.param()


@pytest.fixture(scope="module")
def task(tokenizer):
    return make_task(S, tokenizer, tokenizer.eos_token_id, 40, seed=4)


def spelled(tokenizer, prompt):
    return tokenizer.decode(prompt[1:]).strip()


def test_names_are_those_that_the_tokenizer_knows(tokenizer):
    found = names_of(tokenizer)
    assert len(found) >= 20
    assert set(found) <= set(KNOWN)
    for name, token in found.items():
        assert tokenizer.decode([token]).strip() == name


def test_prompts_are_what_the_tokenizer_makes_of_their_text(tokenizer, task):
    """Spliced from a sentence and names, they are the tokens of the whole text."""
    for prompts in (task.clean, *task.corrupted.values()):
        for prompt in prompts:
            again = tokenizer.encode(spelled(tokenizer, prompt), add_special_tokens=False)
            assert [tokenizer.eos_token_id, *again] == prompt.tolist()


def test_prompts_are_the_sentences_with_names_in_either_order(tokenizer, task):
    first = {"ABBA": 0, "BABA": 0}
    for row, prompt in enumerate(task.clean):
        IO, subject = (tokenizer.decode([int(t[row])]).strip() for t in (task.answer, task.distractor))
        text = spelled(tokenizer, prompt)
        words = text.replace(",", "").replace(".", "").split()
        assert words.count(IO) == 1
        assert words.count(subject) == 2
        order = "ABBA" if words.index(IO) < words.index(subject) else "BABA"
        first[order] += 1
        frame = text.replace(IO, "@").replace(subject, "@")
        assert any(
            frame == template.replace("PLACE", place).replace("OBJECT", thing)
            for template, place, thing in itertools.product(TEMPLATES, PLACES, OBJECTS)
        )
    assert min(first.values()) > 0.4 * S


def test_places_hold_the_names(task):
    rows, where = torch.arange(S), task.positions
    assert torch.equal(task.clean[rows, where["IO"]], task.answer)
    for name in ("S1", "S2"):
        assert torch.equal(task.clean[rows, where[name]], task.distractor)
    assert (where["S1"] < where["S2"]).all()
    assert torch.equal(where["S1+1"], where["S1"] + 1)


def test_corruptions_change_names_alone(tokenizer, task):
    rows, where = torch.arange(S), task.positions
    swapped = task.corrupted["replace_S2"]
    assert torch.equal((swapped != task.clean).nonzero(), torch.stack([rows, where["S2"]], dim=1))
    assert torch.equal(swapped[rows, where["S2"]], task.answer)
    names = torch.tensor(sorted(names_of(tokenizer).values()))
    at = torch.stack([where[name] for name in ("IO", "S1", "S2")], dim=1)
    others = task.corrupted["ABC"].gather(1, at)
    assert torch.isin(others, names).all()
    for row in range(S):
        assert len({*others[row].tolist(), int(task.answer[row]), int(task.distractor[row])}) == 5
    restored = task.corrupted["ABC"].scatter(1, at, task.clean.gather(1, at))
    assert torch.equal(restored, task.clean)


def test_the_length_is_the_commonest_that_fits():
    tokenizer = train_bpe(texts(), 420)
    filled = {
        template.replace(" @", " John").replace("PLACE", place).replace("OBJECT", thing)
        for template, place, thing in itertools.product(TEMPLATES, PLACES, OBJECTS)
    }
    surplus = 3 * (len(tokenizer.encode(" John")) - 1)
    sizes = Counter(1 + len(ids) - surplus for ids in tokenizer(list(filled))["input_ids"])
    commonest = max(sizes, key=lambda n: sizes[n])
    assert min(sizes) < commonest < max(sizes)
    for longest in (max(sizes), commonest, commonest - 1, min(sizes)):
        found = Counter(len(s.tokens) for s in find_sentences(tokenizer, 0, longest, "k"))
        assert list(found.values()) == [max(count for n, count in sizes.items() if n <= longest)]
        assert all(sizes[n] == count for n, count in found.items())
    with pytest.raises(StudyError, match=f"k: the shortest prompt has {min(sizes)} tokens .*sequence_length=5"):
        find_sentences(tokenizer, 0, 5, "k")


def test_random_tokens_stand_where_names_would(tokenizer):
    task = make_task(S, tokenizer, tokenizer.eos_token_id, 40, seed=4, names="random_tokens")
    assert task.clean.shape == make_task(S, tokenizer, tokenizer.eos_token_id, 40, seed=4).clean.shape
    assert len(task.answer.unique()) > 100
    assert ((task.clean == task.answer[:, None]).sum(dim=1) == 1).all()
    assert ((task.clean == task.distractor[:, None]).sum(dim=1) == 2).all()


@pytest.mark.parametrize("joined", ["John and", "and John"])
def test_tokens_that_reach_from_a_name_into_its_neighbours_are_an_error(joined):
    tokenizer = train_bpe(texts(), 300)
    tokenizer.add_tokens([joined])
    with pytest.raises(StudyError, match=r"circuits\.tasks\.ioi: this tokenizer has tokens that are of a name and"):
        make_task(4, tokenizer, 0, 60, 0)
