"""What a family of models must tell: how to configure one, where its blocks are, which sites it has."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig

from universality.models.settings import TrainedModel
from universality.models.taps import Taps


class Family(NamedTuple):
    """One architecture as transformers has it."""

    name: str
    """The `model_type` of transformers' config."""
    configure: Callable[[TrainedModel, int, int, int], PretrainedConfig]
    """(settings, vocabulary size, context length, end-of-text id) -> config of a new model."""
    blocks: Callable[[nn.Module], nn.ModuleList]
    attach: Callable[[nn.Module, Taps], None]
    """Route the family's inner values through the taps; residual streams are routed for all families alike."""
    sites: Callable[[PretrainedConfig], dict[str, tuple[int, ...]]]
    """Inner sites and their shapes after batch and position."""
    neuron_sites: Callable[[int], tuple[str, ...]]
    """The sites of one layer that make up its neurons, for the neuron baseline."""
