"""Language models with weights set by hand, whose circuit for the induction task is known."""

from universality.circuits.planted.base import Planted
from universality.circuits.planted.mamba import planted_mamba
from universality.circuits.planted.mamba2 import planted_mamba2
from universality.circuits.planted.transformer import planted_transformer

__all__ = ["Planted", "planted_mamba", "planted_mamba2", "planted_transformer"]
