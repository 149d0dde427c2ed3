"""Settings of the corpus stage."""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from universality.settings import Fraction, Name, Positive, Seed, Settings

TRAIN, EVALUATION = "train", "evaluation"
"""The splits of the main source's documents; what else documents.parquet has is named in corpus.documents.others."""

Packages = Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]], Field(min_length=1)]
"""Import names of whole packages, harvested in this order."""


class DocstringsSource(Settings):
    """Docstrings of installed packages: English technical prose that is at hand without a network."""

    kind: Literal["docstrings"] = "docstrings"
    packages: Packages


class SourceCodeSource(Settings):
    """Functions and classes of installed packages without their docstrings: a domain that is far from prose."""

    kind: Literal["source_code"] = "source_code"
    packages: Packages


class FilesSource(Settings):
    """Local files: .txt (a document each), .jsonl, .parquet (a document a row)."""

    kind: Literal["files"] = "files"
    paths: Annotated[list[str], Field(min_length=1)]
    """Files, folders (searched through) or glob patterns."""
    text_field: str = "text"
    """The column or key that holds the text in .jsonl and .parquet files."""


class HubSource(Settings):
    """A data set of the Hugging Face hub, or a local folder in the same format, streamed."""

    kind: Literal["hub"] = "hub"
    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """Branch, tag or commit of the data set's repository."""
    text_field: str = "text"
    max_documents: Positive
    """Streaming stops after this many documents."""


class TrainedTokenizer(Settings):
    """Byte-level BPE trained on the train documents."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=257, le=2**17)]


class PretrainedTokenizer(Settings):
    """The tokenizer that comes with a model of the hub or in a local folder."""

    kind: Literal["pretrained"] = "pretrained"
    name: str
    revision: str | None = None


AnyTokenizer = Annotated[TrainedTokenizer | PretrainedTokenizer, Field(discriminator="kind")]


AnySource = Annotated[
    DocstringsSource | SourceCodeSource | FilesSource | HubSource,
    Field(discriminator="kind"),
]


class Corpus(NamedTuple):
    """A source, the key of the study that errors name, and the split of its documents; None for the main source's."""

    source: AnySource
    key: str
    split: str | None


class DocumentsSettings(Settings):
    source: AnySource
    """What models and SAEs are trained on, and the documents held out from it."""
    others: dict[Name, AnySource]
    """Further corpora, whose documents train nothing: comparisons name them as their `corpus`."""
    min_characters: Positive
    """Shorter documents are dropped."""
    evaluation_fraction: Fraction
    """Share of the main source's documents that no model or SAE is trained on."""
    split_seed: Seed

    @model_validator(mode="after")
    def _others_are_no_splits(self):
        for name in self.others.keys() & {TRAIN, EVALUATION}:
            raise ValueError(f"others.{name}: the main source has a split of that name; choose another")
        return self

    @property
    def held_out(self) -> list[str]:
        """Every corpus of documents that nothing is trained on."""
        return [EVALUATION, *sorted(self.others)]

    @property
    def corpora(self) -> list[Corpus]:
        """All that is read, in this order: the main source, then the others by name."""
        others = [Corpus(self.others[name], f"corpus.documents.others.{name}", name) for name in sorted(self.others)]
        return [Corpus(self.source, "corpus.documents.source", None), *others]


class CorpusSettings(Settings):
    documents: DocumentsSettings
    tokenizer: AnyTokenizer
    """The study's own, of every model that names no other."""
    other_tokenizers: dict[Name, AnyTokenizer]
    """Further ones, which models name as their `tokenizer`."""
    sequence_length: Annotated[int, Field(ge=8)]
    """Tokens a sequence, the leading end-of-text token included."""
