"""Settings of the corpus stage."""

from typing import Annotated, Literal

from pydantic import Field

from universality.settings import Fraction, Positive, Seed, Settings


class DocstringsSource(Settings):
    """Docstrings of installed packages: English technical prose that is at hand without a network."""

    kind: Literal["docstrings"] = "docstrings"
    packages: Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]], Field(min_length=1)]
    """Import names of whole packages, harvested in this order."""


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


class DocumentsSettings(Settings):
    source: Annotated[DocstringsSource | FilesSource | HubSource, Field(discriminator="kind")]
    min_characters: Positive
    """Shorter documents are dropped."""
    evaluation_fraction: Fraction
    """Share of the documents that no model or SAE is trained on."""
    split_seed: Seed


class CorpusSettings(Settings):
    documents: DocumentsSettings
    tokenizer: AnyTokenizer
    sequence_length: Annotated[int, Field(ge=8)]
    """Tokens a sequence, the leading end-of-text token included."""
