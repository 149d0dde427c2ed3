"""What a family of models must tell: how to configure one, what its block does, which sites it has."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from universality.models.settings import TrainedModel
from universality.models.taps import Shape, Taps


class Family(NamedTuple):
    """One architecture as transformers has it."""

    name: str
    """The `model_type` of transformers' config."""
    configure: Callable[[TrainedModel, int, int, int], PretrainedConfig]
    """(settings, vocabulary size, context length, end-of-text id) -> config of a new model."""
    stack: str
    """Names of submodules of the causal model: everything below the unembedding,"""
    blocks: str
    """and within that stack the list of blocks,"""
    embedding: str
    """the token embedding,"""
    final_norm: str
    """and the norm before the unembedding."""
    forward: Callable[[nn.Module, torch.Tensor, Taps, int, dict[str, Any]], torch.Tensor]
    """(block, residual stream [B, L, D], taps, layer, transformers' further arguments) -> residual stream."""
    sites: Callable[[PretrainedConfig, int], dict[str, Shape]]
    """(config, layer) -> the block's inner sites; residual streams are the same for all families."""
    mixers: tuple[str, ...]
    """Kinds of sites, "attn.z" say, through which alone one position reaches another."""
    output: Callable[[torch.Tensor], Any] = lambda hidden: hidden
    """What transformers' model expects a block to return for a residual stream."""
    prepare: Callable[[nn.Module], None] = lambda hf: None
    """Done to the whole model once, before anything is run."""
    attach: Callable[[nn.Module, int, Taps], None] = lambda block, layer, taps: None
    """Prepare a block for `forward`, once."""
    max_positions: Callable[[PretrainedConfig], int | None] = lambda config: None
    """The longest sequence that positions can be told for; None if there is no limit."""

    float32_products: tuple[str, ...] = ()
    """Linear layers that are not multiplied in bfloat16."""
    logit_scale: Callable[[PretrainedConfig], float] = lambda config: 1.0
    """What logits are multiplied by after the unembedding."""
    recurrence: Callable[[nn.Module, int, dict[str, torch.Tensor]], Any] | None = None
    """(block, layer, captured sites) -> the state-space recurrence of a run, for families that have one."""

    def in_layer(self, kinds: tuple[str, ...], layer: int) -> list[str]:
        """Site names of one layer: "attn.z" of layer 3 is attn.3.z."""
        return ["{}.{}.{}".format(kind.split(".")[0], layer, kind.split(".")[1]) for kind in kinds]

    def block_list(self, hf: nn.Module) -> nn.ModuleList:
        return hf.get_submodule(f"{self.stack}.{self.blocks}")  # type: ignore[return-value]
