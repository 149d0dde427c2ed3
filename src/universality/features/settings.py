"""Settings of the features stage."""

from universality.settings import Positive, Settings


class FeaturesSettings(Settings):
    threads: Positive
    batch_size: Positive
    """Tokens encoded at a time."""
