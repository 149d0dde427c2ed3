"""Settings of the activations stage."""

from typing import Literal

from pydantic import model_validator

from universality.settings import Positive, Seed, Settings


class CacheSettings(Settings):
    """What one shard depends on; its sequences are the given part of an endless sample."""

    sample_seed: Seed
    """Draws which sequences of a split are taken; more sequences extend the sample, they do not change it."""
    shard_sequences: Positive
    """Sequences a shard, the unit of resuming and of parallel work."""
    batch_size: Positive
    dtype: Literal["float32", "bfloat16"]
    """How activations are stored."""


class ActivationsSettings(Settings):
    threads: Positive
    train_sequences: Positive
    """Sequences that SAEs are trained on; a multiple of shard_sequences."""
    evaluation_sequences: Positive
    """Sequences of held-out documents that everything is compared on; a multiple of shard_sequences."""
    cache: CacheSettings

    @model_validator(mode="after")
    def _whole_shards(self):
        for key in ("train_sequences", "evaluation_sequences"):
            if getattr(self, key) % self.cache.shard_sequences:
                size = self.cache.shard_sequences
                raise ValueError(f"{key}: {getattr(self, key)} is not a multiple of cache.shard_sequences={size}")
        return self

    def n_shards(self, split: str) -> int:
        sequences = self.train_sequences if split == "train" else self.evaluation_sequences
        return sequences // self.cache.shard_sequences
