"""What holds of every source of documents: the same texts come out, in the same order, each with id and source."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from universality.corpus.documents import collect_documents
from universality.corpus.settings import DocstringsSource, DocumentsSettings, FilesSource, HubSource, SourceCodeSource

TEXTS = [f"document number {n}, with enough text to keep — ünïcode too" for n in range(30)]


def txt(folder):
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf8")
    return FilesSource(paths=[str(folder)])


def jsonl(folder):
    lines = [json.dumps({"text": text, "other": 1}) for text in TEXTS]
    (folder / "all.jsonl").write_text("\n".join(lines), encoding="utf8")
    return FilesSource(paths=[str(folder / "all.jsonl")])


def parquet(folder):
    pq.write_table(pa.table({"text": TEXTS, "other": list(range(30))}), folder / "all.parquet")
    return FilesSource(paths=[str(folder / "*.parquet")])


def hub_parquet(folder):
    (folder / "data").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), folder / "data" / "train-00000-of-00001.parquet")
    return HubSource(name=str(folder), max_documents=100)


def hub_jsonl(folder):
    lines = [json.dumps({"text": text, "meta": {"set": "SlimPajama"}}) for text in [*TEXTS, "one too many"]]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf8")
    return HubSource(name=str(folder), max_documents=30)


def docstrings(folder):
    package = folder / "package_of_texts"
    package.mkdir()
    (package / "__init__.py").write_text("\n".join(f"def f{n}():\n    {text!r}" for n, text in enumerate(TEXTS)))
    return DocstringsSource(packages=["package_of_texts"])


def source_code(folder):
    package = folder / "package_of_code"
    package.mkdir()
    functions = [f'def f{n}():\n    """Not this."""\n    return {text!r}' for n, text in enumerate(TEXTS)]
    (package / "__init__.py").write_text("\n\n".join(functions))
    return SourceCodeSource(packages=["package_of_code"])


@pytest.mark.parametrize("make", [txt, jsonl, parquet, hub_parquet, hub_jsonl, docstrings, source_code])
def test_source(make, tmp_path, monkeypatch):
    folder = tmp_path / "texts"  # beside the cache, whose files datasets would take for splits
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    settings = DocumentsSettings(
        source=make(folder), others={}, min_characters=5, evaluation_fraction=0.5, split_seed=0
    )
    table = collect_documents(settings).to_pydict()
    is_code = make is source_code
    assert table["text"] == [f"def f{n}():\n    return {t!r}" if is_code else t for n, t in enumerate(TEXTS)]
    assert len(set(table["id"])) == len(TEXTS)
    assert all(table["source"])
    assert set(table["split"]) == {"train", "evaluation"}
    assert collect_documents(settings).to_pydict() == table
