"""Settings of the export to Neuronpedia; left out, numbers are those of SAEDashboard."""

from universality.settings import Positive, Settings


class NeuronpediaSettings(Settings):
    model_id: str
    """The model's name there, such as gpt2-small."""
    sae_set: str
    """The name of what the dictionary belongs to there, such as res-jb."""
    reach: Positive = 32
    """Tokens of a context on either side of the one it is shown for."""
    top: Positive = 20
    """Contexts where a feature is most active."""
    bins: Positive = 5
    """Intervals of equal width from 0 to a feature's largest activation."""
    per_bin: Positive = 5
    """Contexts of each of them."""
    logits: Positive = 10
    """Tokens whose logits a feature raises most, and lowers most."""
    bars: Positive = 50
    """Of a histogram."""
    features_per_file: Positive = 128
