"""Settings of the activations stage."""

from typing import Literal

from pydantic import model_validator

from universality.corpus.settings import TRAIN
from universality.settings import Name, Positive, Seed, Settings

DType = Literal["bf16", "fp32"]
Products = Literal["bfloat16", "float32"]
Device = Literal["cpu", "cuda"]
Split = Name
"""train, evaluation or the name of another corpus, whose documents are held out too."""


class CacheSettings(Settings):
    """How the sample is drawn and run, the same for every shard."""

    sample_seed: Seed
    """Draws which sequences of a split are taken; more sequences extend the sample, they do not change it."""
    shard_sequences: Positive
    """Sequences a shard, the unit of resuming and of parallel work."""
    batch_size: Positive
    """Sequences that the model runs on at a time."""
    products: Products
    """How the model multiplies matrices. bfloat16 is quicker where the CPU has it; what it costs is in the manifest."""
    device: Device
    """What the model runs on."""


class ShardSettings(CacheSettings):
    """What one shard depends on; its sequences are the given part of an endless sample."""

    dtype: DType


class StreamSettings(Settings):
    """What a stream depends on: the sample, and how much of it is shuffled at a time."""

    sample_seed: Seed
    sequences: Positive
    batch_size: Positive
    products: Products
    device: Device
    dtype: DType
    buffer_rows: Positive


class ActivationsSettings(Settings):
    threads: Positive
    train: Literal["store", "stream"]
    """Where SAEs get what they are trained on: from shards on disk, or from the model, run anew by every SAE job."""
    train_sequences: Positive
    """Sequences that SAEs are trained on; a multiple of shard_sequences."""
    evaluation_sequences: Positive
    """Sequences of each held-out corpus that everything is compared on; a multiple of shard_sequences."""
    dtype: DType
    """How activations are stored; a stream rounds to it too."""
    buffer_rows: Positive
    """Rows that a stream holds and shuffles at a time; a store is shuffled whole."""
    cache: CacheSettings

    @model_validator(mode="after")
    def _whole_shards(self):
        for key in ("train_sequences", "evaluation_sequences"):
            if getattr(self, key) % self.cache.shard_sequences:
                size = self.cache.shard_sequences
                raise ValueError(f"{key}: {getattr(self, key)} is not a multiple of cache.shard_sequences={size}")
        return self

    def n_sequences(self, split: str) -> int:
        return self.train_sequences if split == TRAIN else self.evaluation_sequences

    def n_shards(self, split: str) -> int:
        return self.n_sequences(split) // self.cache.shard_sequences

    @property
    def shard(self) -> ShardSettings:
        return ShardSettings(**self.cache.model_dump(), dtype=self.dtype)

    @property
    def stream(self) -> StreamSettings:
        return StreamSettings(
            sample_seed=self.cache.sample_seed,
            sequences=self.train_sequences,
            batch_size=self.cache.batch_size,
            products=self.cache.products,
            device=self.cache.device,
            dtype=self.dtype,
            buffer_rows=self.buffer_rows,
        )
