"""`universality corpus`: documents, tokenizer, tokens."""

from pathlib import Path
from typing import Annotated

import typer

from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.corpus.settings import AnyTokenizer, DocumentsSettings
from universality.runtime import configure
from universality.settings import Name, parse_argument
from universality.settings import Settings as SettingsBase

app = stage("Text to token sequences.")

Documents = Annotated[Path, typer.Option(help="documents.parquet from `corpus documents`.")]
Tokenizer = Annotated[Path, typer.Option(help="Tokenizer folder from `corpus tokenizer`.")]


class TokenizerJob(SettingsBase):
    tokenizer: AnyTokenizer
    name: Name | None = None
    """In corpus.other_tokenizers; the study's own if left out."""

    @property
    def key(self) -> str:
        """In the study."""
        return f"corpus.other_tokenizers.{self.name}" if self.name else "corpus.tokenizer"


@app.command(
    epilog=example(
        """corpus documents --settings '{"source": {"kind": "files", "paths": ["texts/*.txt"]}, "others": {},
        "min_characters": 64, "evaluation_fraction": 0.1, "split_seed": 1}' --out documents.parquet"""
    )
)
def documents(settings: Settings, out: Out, threads: Threads = 1, log: Log = None) -> None:
    """Collect documents from all sources, drop doubles, split the main source's into train and evaluation."""
    configure(threads, log)
    from universality.corpus.documents import write_documents

    write_documents(parse_argument(DocumentsSettings, settings), out)


@app.command(
    epilog=example(
        """corpus tokenizer --settings '{"tokenizer": {"kind": "bpe", "vocab_size": 1024}}'
        --documents documents.parquet --out tokenizer"""
    )
)
def tokenizer(settings: Settings, documents: Documents, out: Out, threads: Threads = 1, log: Log = None) -> None:
    """Train a byte-level BPE on the train documents, or take a model's tokenizer."""
    configure(threads, log)
    from universality.corpus.tokenizer import write_tokenizer

    job = parse_argument(TokenizerJob, settings)
    write_tokenizer(job.tokenizer, documents, out, job.key)


@app.command(
    epilog=example(
        "corpus tokens --documents documents.parquet --tokenizer tokenizer --sequence-length 64 --out tokens"
    )
)
def tokens(
    documents: Documents,
    tokenizer: Tokenizer,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens a sequence, the leading one included.")],
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Cut the tokenized documents into sequences of one length."""
    configure(threads, log)
    from universality.corpus.packing import write_tokens

    write_tokens(documents, tokenizer, sequence_length, out)
