"""One interface to language models of every family: named sites that a run can read and edit."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from universality.errors import StudyError
from universality.models.families.base import Family
from universality.models.families.gpt_neox import GPT_NEOX
from universality.models.families.mamba import MAMBA
from universality.models.taps import Edit, Taps

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT_NEOX, MAMBA)}


class Run(NamedTuple):
    """`logits` [B, L, V]; `captured`: site -> value."""

    logits: torch.Tensor
    captured: dict[str, torch.Tensor]


class LanguageModel:
    """A model of transformers with taps on its residual stream and on its family's inner sites."""

    def __init__(self, hf: nn.Module):
        name = hf.config.model_type
        if name not in FAMILIES:
            raise StudyError(f"model family {name!r} is unknown; allowed: {', '.join(FAMILIES)}")
        self.hf = hf
        self.family = FAMILIES[name]
        self._taps = Taps()
        blocks = self.family.blocks(hf)
        self.n_layers = len(blocks)
        self.d_model = hf.config.hidden_size
        # Hook the blocks themselves: transformers' `hidden_states` is shifted for Mamba and normalised at the end.
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self._entering(f"resid_pre.{index}"))
            block.register_forward_hook(self._leaving(f"resid_post.{index}"))
        self.family.attach(hf, self._taps)

    def _entering(self, site: str):
        return lambda module, args: (self._taps(site, args[0]), *args[1:])

    def _leaving(self, site: str):
        return lambda module, args, out: self._taps(site, out)

    @property
    def sites(self) -> dict[str, tuple[int, ...]]:
        """Every site that can be read and edited, with its shape after batch and position."""
        stream = {f"{s}.{i}": (self.d_model,) for s in ("resid_pre", "resid_post") for i in range(self.n_layers)}
        return stream | self.family.sites(self.hf.config)

    def run(self, tokens: torch.Tensor, capture: Iterable[str] = (), edits: Mapping[str, Edit] | None = None) -> Run:
        """Logits and captured values for `tokens` [B, L]. An edit maps a site's value to the one to go on with.

        Raises StudyError for a site that the model does not have.
        """
        taps = self._taps
        taps.capture, taps.edits, taps.captured = frozenset(capture), dict(edits or {}), {}
        unknown = [site for site in (*taps.capture, *taps.edits) if site not in self.sites]
        if unknown:
            raise StudyError(f"{self.family.name} has no site {unknown[0]!r}; it has {', '.join(self.sites)}")
        try:
            logits = self.hf(tokens, use_cache=False).logits
            return Run(logits, taps.captured)
        finally:
            taps.capture, taps.edits, taps.captured = frozenset(), {}, {}


def load_model(folder: Path) -> LanguageModel:
    """A model from a folder in transformers' format with safetensors weights, in float32, ready to evaluate.

    Raises StudyError naming the folder if it cannot be read. No code from the folder is run.
    """
    from transformers import AutoModelForCausalLM

    try:
        hf = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # the library raises many kinds, each with pages of text
        raise StudyError(f"{folder}: not a readable model folder: {' '.join(str(error).split())[:200]}") from None
    return LanguageModel(hf.eval().requires_grad_(False))
