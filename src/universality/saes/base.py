"""Sparse dictionaries of the form

    pre     = (x - b_dec) @ W_enc + b_enc                  [B, F]
    codes   = activation(pre)                              [B, F], few of them not zero
    x_hat   = codes @ W_dec + b_dec                        [B, d_out]

with a variant's own activation and loss. A sparse autoencoder reconstructs its input (d_out = d_in); a transcoder
another site. `encoder_centred` is false where the encoder does not subtract b_dec. W_enc [d_in, F] is laid out feature
by feature in memory, as W_dec [F, d_out] is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import nn

from universality.activations.settings import Products
from universality.saes.entries import DenseEntries, Entries, SparseEntries, product
from universality.saes.sparse.pattern import Pattern
from universality.saes.sparse.products import Projection
from universality.saes.sparse.selection import Selected

_CHUNK_BYTES = 2**26  # of pre-activations, which exist for a chunk of the rows at a time
_PROBED_ROWS = 64  # from which the share of active features is told
_SPARSE_SHARE = 1 / 32  # of active features, up to which sparse arithmetic is the quicker one
_LAYER_NORM_EPSILON = 1e-5

_MEMORY: dict[tuple, torch.Tensor] = {}

Normalisation = Literal["none", "layer_norm", "constant_norm_rescale"]
"""Of each row, by sae-lens' names: standardised; scaled to norm sqrt(d_in)."""


class Step(NamedTuple):
    """What a training step computes on a batch: the loss, where and how strongly features are active, x_hat [B, d]."""

    loss: torch.Tensor
    entries: Entries
    values: torch.Tensor
    x_hat: torch.Tensor


class SAE(nn.Module, ABC):
    """Base of all variants."""

    architecture: ClassVar[str]
    """Name of the variant in settings and, where it has one there, in sae-lens."""
    unit_norm_decoder: ClassVar[bool] = True
    """Are decoder rows kept at unit norm in training?"""
    decoder_norm: ClassVar[float] = 1.0
    """Of every decoder row at the start."""
    starts_tied: ClassVar[bool] = True
    """Is the encoder the decoder's transpose at the start? It is not where they are of different sites."""
    always_sparse: ClassVar[bool] = False
    """Does the activation itself bound how much is active?"""
    encoder_centred: bool = True
    frozen_decoder: bool = False
    """Does W_dec stay as `initialise` draws it, its rows at unit norm?"""
    dead_steps: int = 2**62
    """In training, features that did not fire for so many steps are dead."""
    products: Products = "float32"
    normalisation: Normalisation = "none"
    """What is done to each input before it is encoded, and undone to its reconstruction. Only loaded ones do it."""

    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None):
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out or d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_out or d_in))
        self.register_buffer("steps_since_fired", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("firings", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("rows_seen", torch.zeros((), dtype=torch.int64))

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    # What a variant gives

    @abstractmethod
    def select(self, x: torch.Tensor) -> Selected:
        """The entries that may be active, and their pre-activations, of centred inputs x [B, d_in], by the kernels; no
        gradients."""

    @abstractmethod
    def kept(self, pre: torch.Tensor) -> torch.Tensor | float:
        """The same by torch: 1 where an entry of pre [B, F] may be active, 0 elsewhere, or 1 for all."""

    @abstractmethod
    def values(self, entries: Entries) -> torch.Tensor:
        """The codes at the entries."""

    @abstractmethod
    def loss(self, x: torch.Tensor, target: torch.Tensor, entries: Entries, sparsity_warmth: float) -> Step:
        """On a batch x [B, d_in] whose reconstruction should be `target` [B, d_out]; `sparsity_warmth` rises from 0
        to 1 over the warm-up."""

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Called after every training step: counts the steps since each feature fired, and how often it did."""
        firings = step.entries.firings(step.values)
        self.steps_since_fired += 1
        self.steps_since_fired[firings > 0] = 0
        self.firings += firings
        self.rows_seen += step.entries.n_rows

    def forget_firings(self) -> None:
        """Begin anew to count how often features fire."""
        self.firings.zero_()
        self.rows_seen.zero_()

    def frequencies(self) -> torch.Tensor:
        """Share of the rows since `forget_firings` at which each feature fired [F]."""
        return self.firings / self.rows_seen.clamp_min(1)

    def dead(self) -> torch.Tensor:
        """The features [n] that have not fired in the last `dead_steps` training steps."""
        return torch.nonzero(self.steps_since_fired >= self.dead_steps).flatten()

    # What all share

    def freeze_decoder(self) -> None:
        """Let training leave W_dec as it is; to be called before `initialise`."""
        self.frozen_decoder = True
        self.W_dec.requires_grad_(False)

    @torch.no_grad()
    def initialise(self, mean: torch.Tensor, generator: torch.Generator) -> None:
        """Random decoder directions of one norm, the encoder their transpose or random too, b_dec at the target's mean
        [d_out]. A frozen decoder has unit norm; the encoder is what it would be otherwise."""
        directions = torch.randn(self.W_dec.shape, generator=generator)
        norms = directions.norm(dim=1, keepdim=True)
        start = self.decoder_norm * directions / norms
        self.W_dec.copy_(directions / norms if self.frozen_decoder else start)
        if self.starts_tied:
            self.W_enc.copy_(start.T)
        else:
            encoder = torch.randn(self.d_sae, self.d_in, generator=generator)
            self.W_enc.copy_((encoder / encoder.norm(dim=1, keepdim=True)).T)
        self.b_dec.copy_(mean)

    def train_step(self, x: torch.Tensor, target: torch.Tensor, sparsity_warmth: float) -> Step:
        """The loss on a batch, by whichever arithmetic is quicker for it."""
        sparse = self.always_sparse or self._active_share(x) <= _SPARSE_SHARE
        entries = self.sparse_entries(x) if sparse else self.dense_entries(x)
        return self.loss(x, target, entries, sparsity_warmth)

    def dense_entries(self, x: torch.Tensor) -> DenseEntries:
        pre = product(self._centred(x), self.W_enc, self.products) + self.b_enc
        return DenseEntries(pre, self.kept(pre.detach()), self.products)

    def sparse_entries(self, x: torch.Tensor) -> SparseEntries:
        with torch.no_grad():
            centred = self._centred(x)
            pattern, pre = self.select(centred)
        b_dec = self.b_dec if self.encoder_centred else None
        return SparseEntries(Projection.apply(pre.float(), centred, self.W_enc, self.b_enc, b_dec, pattern), pattern)

    def reconstruct(self, x: torch.Tensor, entries: Entries, values: torch.Tensor) -> torch.Tensor:
        """x_hat [B, d_out] of codes with these values, those of x [B, d_in]."""
        return entries.decode(values, self.W_dec) + self.b_dec

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes [B, F] of inputs x [B, d_in], dense."""
        pre = product(self._centred(self._normalised(x)[0]), self.W_enc, self.products) + self.b_enc
        return self.values(DenseEntries(pre, self.kept(pre), self.products))

    @torch.no_grad()
    def encode_sparse(self, x: torch.Tensor) -> tuple[Pattern, torch.Tensor]:
        """The active entries of inputs x [B, d_in], and the codes there [n], all of them positive."""
        pattern, pre = self.select(self._centred(self._normalised(x)[0]))
        values = self.values(SparseEntries(pre.float(), pattern))
        active = values > 0
        return (pattern, values) if bool(active.all()) else (pattern.where(active.numpy()), values[active])

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """codes @ W_dec + b_dec [B, d_out] of dense codes [B, F]: x_hat, where inputs are not normalised and none is
        passed on."""
        return torch.addmm(self.b_dec, codes, self.W_dec)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x_hat [B, d_out] of inputs x [B, d_in], through sparse codes."""
        pattern, values = self.encode_sparse(x)
        return self.from_codes(x, pattern, values)

    @torch.no_grad()
    def from_codes(self, x: torch.Tensor, pattern: Pattern, values: torch.Tensor) -> torch.Tensor:
        """x_hat [B, d_out] from the sparse codes of inputs x [B, d_in]."""
        x, mean, scale = self._normalised(x)
        return self.reconstruct(x, SparseEntries(values, pattern), values) * scale + mean

    @torch.no_grad()
    def written(self, x: torch.Tensor, features: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """What `codes` [B, n] of these `features` [n] add to the reconstruction of inputs x [B, d_in]: [B, d_out]."""
        return (codes @ self.W_dec[features]) * self._normalised(x)[2]

    @torch.no_grad()
    def rescale(self, in_scale: torch.Tensor | float, out_scale: torch.Tensor | float) -> None:
        """Make a dictionary from `in_scale * x` to `out_scale * y`, numbers or [d_in] and [d_out], one from x to y with
        the same codes."""
        self.W_enc.mul_(torch.as_tensor(in_scale).view(-1, 1))
        self.W_dec.div_(torch.as_tensor(out_scale))
        self.b_dec.div_(torch.as_tensor(out_scale))

    def pre_chunks(self, x: torch.Tensor) -> Callable[[], Iterator[torch.Tensor]]:
        """Pre-activations of centred inputs x [B, d_in], a chunk of rows at a time, anew at each call.

        A chunk lies in the memory of the one before. In bfloat16 the bias is two more inputs, its rounded value and the
        rest: the sum is in float32 with all else, and costs nothing.
        """
        weights, bias = self.W_enc.detach().T, self.b_enc.detach()
        if self.products == "bfloat16":
            rounded = bias.bfloat16()
            left = self._memory("inputs", len(x), self.d_in + 2)
            right = self._memory("weights", self.d_sae, self.d_in + 2)
            left[:, :-2], left[:, -2:] = x, 1.0
            right[:, :-2], right[:, -2], right[:, -1] = weights, rounded, bias - rounded.float()
        else:
            left, right = x, weights
        size = max(1, _CHUNK_BYTES // (self.d_sae * left.itemsize))

        def chunks() -> Iterator[torch.Tensor]:
            for start in range(0, len(left), size):
                part = left[start : start + size]
                out = self._memory("pre", len(part), self.d_sae, left.dtype)
                if self.products == "bfloat16":
                    yield torch.mm(part, right.T, out=out)
                else:
                    yield torch.addmm(bias, part, right.T, out=out)

        return chunks

    def selected(self, x: torch.Tensor, choose: Callable[[torch.Tensor], Selected]) -> Selected:
        """What `choose` selects from the pre-activations of each chunk of rows."""
        parts = [choose(pre) for pre in self.pre_chunks(x)()]
        return Pattern.stacked([part for part, _ in parts]), torch.cat([values for _, values in parts])

    def _active_share(self, x: torch.Tensor) -> float:
        with torch.no_grad():
            probe = x[:_PROBED_ROWS]
            return len(self.select(self._centred(probe))[0]) / (len(probe) * self.d_sae)

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.b_dec if self.encoder_centred else x

    def _normalised(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | float]:
        """The rows as they are encoded; the mean and the scale that a reconstruction is put back with."""
        if self.normalisation == "layer_norm":
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            return (x - mean) / (std + _LAYER_NORM_EPSILON), mean, std
        if self.normalisation == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return x / scale, 0.0, scale
        return x, 0.0, 1.0

    def _memory(self, name: str, rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Memory [rows, width] that all dictionaries use again: new memory costs more than what is computed in it."""
        key = name, width, dtype
        kept = _MEMORY.get(key)
        if kept is None or len(kept) < rows:
            with torch.inference_mode(False):  # whoever asks first, others may train in it
                kept = _MEMORY[key] = torch.empty(rows, width, dtype=dtype)
        return kept[:rows]


class _SquaredError(torch.autograd.Function):
    """Autograd would make an array [B, d] for every operation, which takes longer than to compute it."""

    @staticmethod
    def forward(ctx, target, x_hat):
        error = target - x_hat
        ctx.save_for_backward(error)
        return error.square().sum(-1).mean()

    @staticmethod
    def backward(ctx, grad):
        (error,) = ctx.saved_tensors
        return None, error * (grad * (-2 / len(error)))


def squared_error(target: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """Mean over rows of the squared distance between rows of two [B, d]; differentiable in `x_hat`."""
    return _SquaredError.apply(target, x_hat)
