"""One interface to language models of every family: named sites that a run can read and edit."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from universality.errors import StudyError
from universality.models.families.base import Family
from universality.models.families.falcon_h1 import FALCON_H1
from universality.models.families.gpt2 import GPT2
from universality.models.families.gpt_neox import GPT_NEOX
from universality.models.families.llama import LLAMA
from universality.models.families.mamba import MAMBA
from universality.models.families.mamba2 import MAMBA2
from universality.models.families.rwkv import RWKV
from universality.models.packed_weights import project_packed
from universality.models.padding import first_positions, position_axes, roll_rows
from universality.models.precision import Products
from universality.models.taps import Edit, Shape, Taps, position_of, template

FAMILIES: dict[str, Family] = {f.name: f for f in (GPT_NEOX, GPT2, LLAMA, MAMBA, MAMBA2, RWKV, FALCON_H1)}


class Run(NamedTuple):
    """`logits` [B, L, V], of `run_to_last` [B, V], None if not asked for; `captured`: site -> value."""

    logits: torch.Tensor
    captured: dict[str, torch.Tensor]


class LanguageModel:
    """A causal model of transformers, its blocks run by its family's forward with every named value tapped."""

    def __init__(self, hf: nn.Module):
        """Takes the model over: its blocks and attention are routed through taps for good."""
        name = hf.config.model_type
        if name not in FAMILIES:
            raise StudyError(f"model family {name!r} is unknown; allowed: {', '.join(FAMILIES)}")
        self.hf = hf
        self.family = FAMILIES[name]
        self.products: Products = "float32"
        """What matrix products are computed in."""
        self.product_error = 0.0
        """What rounding the matrix products has changed the logits by, as a share of their norm."""
        self._taps = Taps()
        self.blocks = self.family.block_list(hf)
        self.n_layers = len(self.blocks)
        self.d_model: int = hf.config.hidden_size
        self._stack = hf.get_submodule(self.family.stack)
        self.family.prepare(hf)
        # The blocks themselves are tapped: transformers' `hidden_states` is shifted for Mamba, normalised at the end.
        for layer, block in enumerate(self.blocks):
            self.family.attach(block, layer, self._taps)
            names = list(inspect.signature(block.forward).parameters)
            block.forward = partial(self._block_forward, block, layer, names)  # type: ignore[method-assign, assignment]
        for site, module in (("embed", self.family.embedding), ("final_norm", self.family.final_norm)):
            self._stack.get_submodule(module).register_forward_hook(self._tapping(site))

    def _block_forward(self, block: nn.Module, layer: int, names: list[str], *values: Any, **keywords: Any) -> Any:
        arguments = dict(zip(names, values, strict=False)) | keywords  # some models pass some of them by position
        hidden = self._taps(f"resid_pre.{layer}", arguments.pop(names[0]))
        hidden = self.family.forward(block, hidden, self._taps, layer, arguments)
        return self.family.output(self._taps(f"resid_post.{layer}", hidden))

    def _tapping(self, site: str) -> Callable:
        return lambda module, args, out: self._taps(site, out)

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @cached_property
    def sites(self) -> dict[str, Shape]:
        """Every site that can be read and edited, with its shape; "B" and "L" are those of the tokens.

        A site whose name ends in @P is asked for with a position in place of P: mamba.0.state@-1.
        """
        stream: Shape = ("B", "L", self.d_model)
        sites: dict[str, Shape] = {"embed": stream}
        for layer in range(self.n_layers):
            sites |= {f"resid_{point}.{layer}": stream for point in ("pre", "mid", "post")}
            sites |= self.family.sites(self.hf.config, layer)
        return sites | {"final_norm": stream}

    def run(
        self,
        tokens: torch.Tensor,
        capture: Iterable[str] = (),
        edits: Mapping[str, Edit] | None = None,
        mask: torch.Tensor | None = None,
        logits: bool = True,
    ) -> Run:
        """Logits and captured values for `tokens` [B, L]. An edit maps a site's value to the one to go on with.

        `mask` [B, L] is true at real tokens where some are padding, on either side; values at padding mean nothing.
        Without `logits` the unembedding is not computed. Raises StudyError for a site or a position that the model does
        not have, more positions than it can tell apart, a mask with holes, and edits or single positions with padding
        on the left.
        """
        taps = self._taps
        taps.set(capture, dict(edits or {}), tokens.shape[1])
        try:
            self._check(tokens.shape[1])
            tokens = tokens.to(self.device)
            mask = None if mask is None else mask.to(self.device)
            first = None
            if mask is not None:
                first = self._first_positions(tokens, mask)
                tokens = tokens.masked_fill(~mask.bool(), 0)  # whatever stands at padding is to be a token
            if first is not None:
                tokens = roll_rows(tokens, first, [1])
            out = (self.hf if logits else self._stack)(tokens, use_cache=False)
            scores, captured = out.logits if logits else None, taps.captured
        finally:
            taps.reset()
        if first is not None:
            scores = None if scores is None else roll_rows(scores, -first, [1])
            captured = {s: roll_rows(v, -first, position_axes(self.sites[s])) for s, v in captured.items()}
        return Run(scores, captured)  # type: ignore[arg-type]

    def _check(self, length: int) -> None:
        if not length:
            raise StudyError("tokens: a sequence needs at least one token")
        named: dict[tuple[str, int], str] = {}
        for site in (*self._taps.capture, *self._taps.edits):
            if template(site) not in self.sites:
                raise StudyError(f"{self.family.name} has no site {site!r}; it has {', '.join(self.sites)}")
            try:
                position = position_of(site)
            except ValueError:
                position = length
            if position is None:
                continue
            if not -length <= position < length:
                raise StudyError(f"site {site!r}: no such position in a sequence of {length} tokens")
            place = template(site), position % length
            if named.setdefault(place, site) != site:
                raise StudyError(f"sites {named[place]!r} and {site!r} are one; use one name for it")
        limit = self.family.max_positions(self.hf.config)
        if limit is not None and length > limit:
            raise StudyError(f"{self.family.name}: {length} tokens are more than the {limit} positions it was made for")

    def _first_positions(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """Where rows begin, None if all at 0. Raises StudyError for what cannot be told or edited beside padding."""
        if mask.shape != tokens.shape:
            raise StudyError(f"mask: has shape {tuple(mask.shape)}, the tokens have {tuple(tokens.shape)}")
        first = first_positions(mask)
        single = [site for site in (*self._taps.capture, *self._taps.edits) if "@" in site]
        from_end = [site for site in single if (position_of(site) or 0) < 0]
        if from_end and not mask.all():
            raise StudyError(f"site {from_end[0]!r}: beside padding, positions are counted from 0")
        if not first.any():
            return None
        if self._taps.edits or single:
            site = single[0] if single else next(iter(self._taps.edits))
            raise StudyError(f"site {site!r}: edits and single positions need padding on the right, not on the left")
        return first

    def run_to_last(
        self, tokens: torch.Tensor, capture: Collection[str] = (), edits: Mapping[str, Edit] | None = None
    ) -> Run:
        """As `run` of tokens without padding, with logits [B, V] of the last position alone, at least float32: the
        unembedding of the others is not computed."""
        logits, captured = self.run(tokens, {*capture, "final_norm"}, edits, logits=False)
        logits = self._logits(captured["final_norm"][:, -1])
        return Run(logits, {site: value for site, value in captured.items() if site in capture})

    def unembed(self, resid: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of the residual stream after the last block [..., D], at whatever positions are given."""
        return self._logits(self._stack.get_submodule(self.family.final_norm)(resid))

    def _logits(self, normed: torch.Tensor) -> torch.Tensor:
        logits = project_packed(self.hf.get_output_embeddings(), normed)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scale = self.family.logit_scale(self.hf.config)
        return logits if scale == 1 else logits * scale  # a copy of the logits is not for nothing

    def promoting(self) -> torch.Tensor:
        """[V, D], float32: what a direction of the stream adds to each token's logit is its product with this, up to
        what the last norm's centring and division do to all tokens alike."""
        gamma = self._stack.get_submodule(self.family.final_norm).weight
        weight = self.hf.get_output_embeddings().weight
        return (weight * gamma * self.family.logit_scale(self.hf.config)).float().cpu()

    def token_losses(
        self, tokens: torch.Tensor, edits: Mapping[str, Edit] | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross entropy in nats of each token given those before it [B, L - 1]; 0 where either is padding."""
        logits = self.run(tokens, edits=edits, mask=mask).logits[:, :-1]
        targets = tokens[:, 1:].to(self.device)
        if mask is None:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        real = (mask[:, 1:].bool() & mask[:, :-1].bool()).to(self.device)
        targets = targets.masked_fill(~real, -100)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    def loss(
        self, tokens: torch.Tensor, edits: Mapping[str, Edit] | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean cross entropy in nats a predicted token, a scalar."""
        count = tokens[:, 1:].numel() if mask is None else int((mask[:, 1:].bool() & mask[:, :-1].bool()).sum())
        if not count:
            raise StudyError("no token comes after another; there is nothing to predict")
        return self.token_losses(tokens, edits, mask).sum() / count

    def spliced_loss(self, tokens: torch.Tensor, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss with each site's value replaced by the given one, an SAE's reconstruction say."""
        return self.loss(tokens, edits={site: partial(_replacing, value) for site, value in values.items()})


def _replacing(value: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    return value
