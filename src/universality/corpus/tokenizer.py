"""The tokenizers of a study, one for all models or several, and their identities.

A tokenizer is a folder in transformers' format. Its identity is a hash of what decides how text becomes numbers: the
vocabulary, the merges and the added tokens; file names, padding and truncation do not matter.
"""

import hashlib
import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from universality.corpus.settings import TRAIN, PretrainedTokenizer, TrainedTokenizer
from universality.errors import StudyError
from universality.storage import read_table, replacing, write_json

END_OF_TEXT = "<|endoftext|>"


def train_bpe(texts, vocab_size: int, key: str = "corpus.tokenizer") -> PreTrainedTokenizerFast:
    """Byte-level BPE (Radford et al. 2019): any text encodes, nothing is lost.

    Raises StudyError naming its `key` in the study if texts are too few.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise StudyError(
            f"{key}.vocab_size: {vocab_size} is more than the corpus supports: it has pieces for only "
            f"{tokenizer.get_vocab_size()} tokens"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def load_tokenizer(path: Path | str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder or of a hub model.

    Raises StudyError where there is none, or if it lacks an end-of-text token or cannot tell where its tokens lie.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds, each with pages of text
        reason = " ".join(str(error).split())[:160]
        raise StudyError(f"{path}: no tokenizer can be loaded (no such folder, or no network?): {reason}") from None
    if tokenizer.eos_token_id is None:
        raise StudyError(f"{path}: its tokenizer has no end-of-text token, which marks where documents end")
    if not tokenizer.is_fast:
        raise StudyError(
            f"{path}: its tokenizer ({type(tokenizer).__name__}) does not tell which characters a token is of; allowed "
            "are those with a tokenizer.json or that transformers converts to one"
        )
    return tokenizer


def write_tokenizer(
    settings: TrainedTokenizer | PretrainedTokenizer, documents: Path, out: Path, key: str = "corpus.tokenizer"
) -> None:
    """Train or fetch a tokenizer; the folder's origin.json says in words where it is from. It is trained on the train
    documents alone. Errors name its `key` in the study."""
    if isinstance(settings, TrainedTokenizer):
        table = read_table(documents, ["split", "text"]).to_pydict()
        texts = (text for text, split in zip(table["text"], table["split"], strict=True) if split == TRAIN)
        tokenizer, origin = train_bpe(texts, settings.vocab_size, key), "the models trained here on the corpus"
    else:
        tokenizer, origin = load_tokenizer(settings.name, settings.revision), settings.name
    with replacing(out) as folder:
        tokenizer.save_pretrained(folder)
        write_json(folder / "origin.json", {"origin": origin, "identity": identity(tokenizer)})


def identity(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hexadecimal digits that two tokenizers share exactly when they have the same tokens and the same merges."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"].get("merges", [])]
    content = [sorted(tokenizer.get_vocab().items()), merges]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
