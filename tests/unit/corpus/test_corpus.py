import json
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import processors

from tests.conftest import LENGTH
from universality.corpus.documents import collect_documents, write_documents
from universality.corpus.packages import docstrings, source_code
from universality.corpus.packing import Encoded, pack, write_tokens
from universality.corpus.settings import (
    DocstringsSource,
    DocumentsSettings,
    FilesSource,
    HubSource,
    PretrainedTokenizer,
    SourceCodeSource,
    TrainedTokenizer,
)
from universality.corpus.sources import local_paths
from universality.corpus.tokenizer import identity, load_tokenizer, train_bpe, write_tokenizer
from universality.corpus.tokens import NO_DOCUMENT, read_tokens
from universality.errors import StudyError
from universality.storage import read_table, write_table


def settings(source, **changes):
    values = {"source": source, "others": {}, "min_characters": 3, "evaluation_fraction": 0.5, "split_seed": 0}
    return DocumentsSettings(**values | changes)


def test_docstrings_of_a_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "harvested"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text('"""The package."""\nraise RuntimeError("imported")\n')
    (package / "b.py").write_text('def f():\n    r"""Says \\d.\n\n    More."""\n    class C:\n        "Inner."\n')
    (package / "a.py").write_text("x = 1\n'not a docstring'\n")
    (package / "inner" / "template.py").write_text("{{ not python }}")
    monkeypatch.syspath_prepend(tmp_path)
    found = [("harvested", "The package."), ("harvested.b.f", "Says \\d.\n\nMore."), ("harvested.b.f.C", "Inner.")]
    assert sorted(docstrings("harvested", "key")) == found


CODE = b'''\
# -*- coding: latin-1 -*-
"""The module."""
import sys

if sys.platform:

    @staticmethod
    def f(x):  # kept: \xe9
        r"""Goes."""

        def inner():
            "Goes too."; return 1
        return "stays"


class C:
    """Goes,
    all of it."""  # with its line
    x = """Not a
docstring."""

    async def g(self):
        'Goes.'
'''


def test_code_of_a_package_without_its_docstrings(tmp_path, monkeypatch):
    package = tmp_path / "coded"
    package.mkdir()
    (package / "__init__.py").write_bytes(CODE.replace(b"\n", b"\r\n"))
    monkeypatch.syspath_prepend(tmp_path)
    (f_name, f), (c_name, c) = source_code("coded", "key")
    assert (f_name, c_name) == ("coded.f", "coded.C")
    assert f.splitlines() == [
        "@staticmethod",
        "def f(x):  # kept: é",
        "",
        "    def inner():",
        "        ; return 1",
        '    return "stays"',
    ]
    assert c.splitlines() == [
        "class C:",
        "      # with its line",
        '    x = """Not a',
        'docstring."""',
        "",
        "    async def g(self):",
    ]


@pytest.mark.parametrize("kind", [DocstringsSource, SourceCodeSource])
def test_a_package_that_is_not_installed_is_named(kind):
    source = kind(packages=["no_such_package"])
    message = "packages: 'no_such_package' is not an installed package"
    with pytest.raises(StudyError, match=rf"^corpus\.documents\.source\.{message}"):
        collect_documents(settings(source))
    with pytest.raises(StudyError, match=rf"^corpus\.documents\.others\.code\.{message}"):
        collect_documents(settings(DocstringsSource(packages=["yaml"]), others={"code": source}))


def test_doubles_go_shorts_go_and_a_grown_corpus_keeps_its_split(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "double.txt").write_text("text 1")
    (tmp_path / "short.txt").write_text("x")
    source = FilesSource(paths=[str(tmp_path)])
    before = collect_documents(settings(source)).to_pydict()
    assert len(before["id"]) == 40
    assert before["characters"] == [len(text) for text in before["text"]]
    (tmp_path / "new.txt").write_text("another text")
    after = collect_documents(settings(source)).to_pydict()
    split = dict(zip(after["id"], after["split"], strict=True))
    assert all(split[i] == s for i, s in zip(before["id"], before["split"], strict=True))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"caf\xe9", "bad.txt: not UTF-8: byte 3 is 0xe9"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": ', "bad.jsonl:2: not valid JSON"),
        ("bad.jsonl", b'{"body": "x"}\n', "bad.jsonl:1: no key 'text'"),
        ("bad.jsonl", b'{"text": 3}\n', "bad.jsonl:1: holds int, not text"),
        ("bad.jsonl", b'{"text": "half \\ud800 pair"}\n', "bad.jsonl:1: character 5 is half of a surrogate pair"),
        ("bad.parquet", b"PAR1 truncated", "bad.parquet: not a readable parquet file"),
        ("bad.csv", b"x", "unknown file type '.csv'; allowed: .txt, .jsonl, .parquet"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StudyError, match=message):
        collect_documents(settings(FilesSource(paths=[str(tmp_path / name)])))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"matches no \.txt, \.jsonl, \.parquet file"):
        collect_documents(settings(FilesSource(paths=[str(tmp_path)])))


def test_a_split_without_documents_is_an_error(tmp_path):
    (tmp_path / "one.txt").write_text("only one document")
    with pytest.raises(StudyError, match="no (train|evaluation) document: 1 documents kept"):
        collect_documents(settings(FilesSource(paths=[str(tmp_path)])))


def write_files(folder, texts) -> FilesSource:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf8")
    return FilesSource(paths=[str(folder)])


def test_other_corpora_are_splits_of_their_names_and_change_nothing_before_them(tmp_path):
    main = write_files(tmp_path / "main", [f"text {n}" for n in range(40)])
    first = write_files(tmp_path / "first", ["of the first", "text 3", "of both", "of the first"])
    second = write_files(tmp_path / "second", ["of both", "of the second"])
    alone = collect_documents(settings(main)).to_pydict()
    table = collect_documents(settings(main, others={"b": second, "a": first})).to_pydict()
    assert all(table[name][: len(alone["id"])] == alone[name] for name in alone)
    others = list(zip(table["split"], table["text"], strict=True))[len(alone["id"]) :]
    assert others == [("a", "of the first"), ("a", "of both"), ("b", "of the second")]
    assert len(set(table["id"])) == len(table["id"])


def test_a_corpus_without_a_document_is_named(tmp_path):
    main = write_files(tmp_path / "main", [f"text {n}" for n in range(40)])
    doubles = write_files(tmp_path / "doubles", ["text 1", "x"])
    message = r"corpus\.documents\.others\.b: no b document: 0 documents kept, 2 dropped as doubles or shorter than "
    with pytest.raises(StudyError, match=message):
        collect_documents(settings(main, others={"b": doubles}))
    missing = FilesSource(paths=[str(tmp_path / "none")])
    with pytest.raises(StudyError, match=r"corpus\.documents\.others\.b\.paths: '.*none' matches no \.txt"):
        collect_documents(settings(main, others={"b": missing}))
    field = FilesSource(paths=[str(tmp_path / "x.jsonl")], text_field="body")
    (tmp_path / "x.jsonl").write_text('{"text": "x"}')
    with pytest.raises(StudyError, match=r"no key 'body' \(corpus\.documents\.others\.b\.text_field\)"):
        collect_documents(settings(main, others={"b": field}))


def test_local_files_of_all_corpora_are_watched(tmp_path):
    main, other = (write_files(tmp_path / name, [f"{name} {n}" for n in range(2)]) for name in ("main", "other"))
    corpora = settings(main, others={"b": other, "c": DocstringsSource(packages=["yaml"])}).corpora
    assert local_paths(corpora) == [str(tmp_path / name / f"0{n}.txt") for name in ("main", "other") for n in (0, 1)]


def test_documents_of_other_corpora_train_nothing(corpus, text_folder, tmp_path, monkeypatch):
    """Tokenizer and train tokens are to the byte what they are without the other corpus."""
    monkeypatch.chdir(text_folder.parent)
    source = FilesSource(paths=[text_folder.name])
    write_documents(settings(source, min_characters=10, evaluation_fraction=0.3), tmp_path / "documents.parquet")
    write_tokenizer(TrainedTokenizer(vocab_size=300), tmp_path / "documents.parquet", tmp_path / "tokenizer")
    write_tokens(tmp_path / "documents.parquet", tmp_path / "tokenizer", LENGTH, tmp_path / "tokens")
    assert not (tmp_path / "tokens" / "other.safetensors").exists()
    for name in ("tokenizer/tokenizer.json", "tokens/train.safetensors", "tokens/evaluation.safetensors"):
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()


def test_a_hub_name_without_network_is_one_line():
    with pytest.raises(StudyError, match="data set nobody/nothing: cannot be streamed") as caught:
        collect_documents(settings(HubSource(name="nobody/nothing", max_documents=5)))
    assert "\n" not in str(caught.value)


def test_bpe_loses_nothing_and_its_identity_is_its_content(corpus, tmp_path):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    for text in ("a model learns", "naïve ∑ 你好\n\ttabs"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    texts = [f"word{n % 50} other{n % 7}" for n in range(500)]
    same, again, other = train_bpe(texts, 280), train_bpe(texts, 280), train_bpe(texts, 290)
    assert identity(same) == identity(again) != identity(other)
    same.model_max_length = 7  # what does not change the tokens does not change the identity
    same.save_pretrained(tmp_path)
    assert identity(load_tokenizer(tmp_path)) == identity(again)


def test_a_vocabulary_beyond_the_corpus_is_an_error():
    with pytest.raises(StudyError, match=r"corpus\.tokenizer\.vocab_size: 5000 is more than the corpus supports"):
        train_bpe(["so few words"], 5000)
    with pytest.raises(StudyError, match=r"corpus\.other_tokenizers\.b\.vocab_size: 5000 is more"):
        train_bpe(["so few words"], 5000, "corpus.other_tokenizers.b")


def test_a_pretrained_tokenizer_is_taken_as_it_is(corpus, tmp_path):
    write_tokenizer(PretrainedTokenizer(name=str(corpus / "tokenizer")), corpus / "documents.parquet", tmp_path / "t")
    assert identity(load_tokenizer(tmp_path / "t")) == identity(load_tokenizer(corpus / "tokenizer"))
    with pytest.raises(StudyError, match="no tokenizer can be loaded"):
        write_tokenizer(PretrainedTokenizer(name="nobody/nothing"), corpus / "documents.parquet", tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_packing_lays_documents_end_to_end():
    ids = [[1, 2, 3], [4], [5, 6]]
    encoded = [Encoded(np.array(i), np.array([(10 * n, 10 * n + 3) for n in i])) for i in ids]
    packed = pack(encoded, rows=[7, 8, 9], length=4, end_of_text=0)
    assert packed["tokens"].tolist() == [[0, 1, 2, 3], [0, 0, 4, 0], [0, 5, 6, 0]]
    none = NO_DOCUMENT
    assert packed["documents"].tolist() == [[none, 7, 7, 7], [none, none, 8, none], [none, 9, 9, none]]
    assert packed["starts"].tolist() == [[none, 10, 20, 30], [none, none, 40, none], [none, 50, 60, none]]
    assert packed["ends"].tolist() == [[none, 13, 23, 33], [none, none, 43, none], [none, 53, 63, none]]
    assert all(array.dtype == np.int32 for array in packed.values())


@pytest.mark.parametrize("split", ["train", "evaluation", "other"])
@pytest.mark.parametrize("name", ["", "small"])
def test_offsets_are_slices_of_the_text(corpus, split, name):
    texts = read_table(corpus / "documents.parquet", ["text"])["text"].to_pylist()
    folders = ("other_tokenizers/small", "other_tokens/small") if name else ("tokenizer", "tokens")
    tokenizer = load_tokenizer(corpus / folders[0])
    sequences = read_tokens(corpus / folders[1], split)
    of_a_document = sequences.documents != NO_DOCUMENT
    assert (sequences.starts[~of_a_document] == -1).all()
    assert (sequences.ends[~of_a_document] == -1).all()
    whole = 0
    for token, row, start, end in zip(*(array[of_a_document].tolist() for array in sequences[:4]), strict=True):
        text = tokenizer.decode([token])
        if "\N{REPLACEMENT CHARACTER}" in text:  # a part of a character, of which it has the whole
            assert end == start + 1
            assert not texts[row][start:end].isascii()
        else:
            assert texts[row][start:end] == text
            whole += 1
    assert whole > 100
    assert (whole < of_a_document.sum()) == (split == "other")


def test_offsets_do_not_depend_on_what_a_tokenizer_does_after_encoding(corpus, tmp_path):
    """Those of GPT-2 and Pythia cut white space off theirs."""
    tokenizer = load_tokenizer(corpus / "tokenizer")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save_pretrained(tmp_path / "trimming")
    write_tokens(corpus / "documents.parquet", tmp_path / "trimming", LENGTH, tmp_path / "tokens")
    for file in sorted((tmp_path / "tokens").iterdir()):
        assert file.read_bytes() == (corpus / "tokens" / file.name).read_bytes()


def test_a_tokenizer_without_offsets_is_refused(monkeypatch, tmp_path):
    slow = SimpleNamespace(eos_token_id=0, is_fast=False)
    monkeypatch.setattr("universality.corpus.tokenizer.AutoTokenizer.from_pretrained", lambda *a, **k: slow)
    with pytest.raises(StudyError, match=r"folder: its tokenizer \(SimpleNamespace\) does not tell which characters"):
        load_tokenizer("folder")


def test_a_split_without_tokens_is_named(corpus):
    with pytest.raises(StudyError, match=r"tokens of the split 'code'; it has evaluation, other, train"):
        read_tokens(corpus / "tokens", "code")


def test_every_token_is_of_the_document_it_says(corpus):
    table = read_table(corpus / "documents.parquet").to_pydict()
    tokenizer = load_tokenizer(corpus / "tokenizer")
    for split in ("train", "evaluation", "other"):
        sequences = read_tokens(corpus / "tokens", split)
        assert sequences.tokens.shape[1] == LENGTH
        assert (sequences.tokens[:, 0] == sequences.end_of_text).all()
        whole = sequences.tokens[:, 1:].ravel()
        owners = sequences.documents[:, 1:].ravel()
        assert ((owners == NO_DOCUMENT) == (whole == sequences.end_of_text)).all()
        row = owners[owners >= 0][0]
        assert table["split"][row] == split
        assert tokenizer.decode(whole[owners == row]) == table["text"][row]


def test_a_corpus_shorter_than_a_sequence_is_an_error(corpus, tmp_path):
    with pytest.raises(StudyError, match=r"sequence_length: 1000000 is longer than the whole train split"):
        write_tokens(corpus / "documents.parquet", corpus / "tokenizer", 1_000_000, tmp_path / "tokens")
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_documents_file_is_named(corpus, tmp_path):
    broken = tmp_path / "documents.parquet"
    broken.write_bytes((corpus / "documents.parquet").read_bytes()[:-20])
    with pytest.raises(StudyError, match=r"documents\.parquet: not a readable parquet file"):
        write_tokenizer(TrainedTokenizer(vocab_size=300), broken, tmp_path / "t")


def test_bytes_do_not_depend_on_the_run(text_folder, other_text_folder, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(text_folder.parent)
    source, other = (FilesSource(paths=[folder.name]) for folder in (text_folder, other_text_folder))
    again = settings(source, others={"other": other}, min_characters=10, evaluation_fraction=0.3)
    write_documents(again, tmp_path / "documents.parquet")
    write_tokens(tmp_path / "documents.parquet", corpus / "tokenizer", LENGTH, tmp_path / "tokens")
    for name in ("documents.parquet", "tokens/train.safetensors", "tokens/other.safetensors", "tokens/meta.json"):
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()


def test_random_jsonl_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(32, 0x2000, 20))) for _ in range(30)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"body": t}) for t in texts), encoding="utf8")
    table = collect_documents(settings(FilesSource(paths=[str(tmp_path / "*.jsonl")], text_field="body")))
    assert table["text"].to_pylist() == texts


def test_a_literal_end_of_text_in_a_text_is_text(corpus, tmp_path):
    texts = ["before <|endoftext|> after, some more text to fill a sequence or two"] * 3
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": f"{n} {t}"}) for n, t in enumerate(texts * 4)))
    table = collect_documents(settings(FilesSource(paths=[str(tmp_path / "x.jsonl")])))
    write_table(tmp_path / "documents.parquet", table)
    write_tokens(tmp_path / "documents.parquet", corpus / "tokenizer", LENGTH, tmp_path / "tokens")
    sequences = read_tokens(tmp_path / "tokens", "train")
    special = sequences.tokens == sequences.end_of_text
    assert (special == (sequences.documents == NO_DOCUMENT)).all()
