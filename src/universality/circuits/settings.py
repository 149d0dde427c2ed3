"""Settings of the circuits stage."""

from typing import Annotated

from pydantic import Field

from universality.settings import Fraction, Positive, Seed, Settings


class CircuitsSettings(Settings):
    threads: Positive
    task_seed: Seed
    """Draws the sequences of the induction task."""
    samples: Annotated[int, Field(ge=2)]
    """Pairs of a clean and a corrupted sequence."""
    batch_size: Positive
    sequence_length: Annotated[int, Field(ge=16)]
    """Tokens a sequence, the leading end-of-text token included; at most the length the models were trained on."""
    bootstrap_seed: Seed
    bootstrap_samples: Annotated[int, Field(ge=20)]
    confidence: Fraction
