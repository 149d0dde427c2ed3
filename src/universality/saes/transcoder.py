"""Transcoder (Dunefsky et al. 2024, arXiv 2406.11944): predicts what a part of the model writes from what it reads.

    codes = BatchTopK's, of x @ W_enc + b_enc
    y_hat = codes @ W_dec + b_dec  (+ x @ W_skip.T, Paulo et al. 2025, arXiv 2501.18823)
    loss  = mean |y - y_hat|^2  +  the auxiliary loss of dead features

Stored as sae-lens' jumprelu transcoder that this is outside training.
"""

import torch

from universality.saes.base import SAE
from universality.saes.batch_topk import BatchTopKSAE
from universality.saes.entries import SparseEntries
from universality.saes.settings import TranscoderSettings


class PredictsTarget(SAE):
    """Base of what predicts another site: there may be a W_skip [d_out, d_in], and the normalisation of an input, which
    tells nothing of the target, is not undone."""

    starts_tied = False
    W_skip: torch.nn.Parameter | None

    def set_skip(self, skip: bool) -> None:
        """To be called once: a W_skip of zeros, or None."""
        self.register_parameter("W_skip", torch.nn.Parameter(torch.zeros(self.d_out, self.d_in)) if skip else None)

    def reconstruct(self, x, entries, values):
        y_hat = super().reconstruct(x, entries, values)
        return y_hat if self.W_skip is None else y_hat + x @ self.W_skip.T

    @torch.no_grad()
    def from_codes(self, x, pattern, values):
        return self.reconstruct(x, SparseEntries(values, pattern), values)

    @torch.no_grad()
    def rescale(self, in_scale, out_scale):
        super().rescale(in_scale, out_scale)
        if self.W_skip is not None:
            self.W_skip.mul_(torch.as_tensor(in_scale)).div_(torch.as_tensor(out_scale).view(-1, 1))


class Transcoder(PredictsTarget, BatchTopKSAE):
    architecture = "transcoder"
    encoder_centred = False

    def __init__(self, d_in: int, d_sae: int, settings: TranscoderSettings, d_out: int):
        super().__init__(d_in, d_sae, settings, d_out)
        self.set_skip(settings.skip)
