"""Settings of the activations stage."""

from typing import Annotated, Literal

from pydantic import Field

from universality.settings import Positive, Seed, Settings


class ActivationsSettings(Settings):
    threads: Positive
    sample_seed: Seed
    """Draws which sequences of a split are taken; more sequences extend the sample, they do not change it."""
    train_sequences: Positive
    """Sequences that SAEs are trained on."""
    evaluation_sequences: Annotated[int, Field(ge=2)]
    """Sequences of held-out documents that everything is compared on."""
    shard_sequences: Positive
    """Sequences a shard, the unit of resuming and of parallel work."""
    batch_size: Positive
    dtype: Literal["float32", "bfloat16"]
    """How activations are stored."""

    def n_shards(self, split: str) -> int:
        sequences = self.train_sequences if split == "train" else self.evaluation_sequences
        return -(-sequences // self.shard_sequences)
