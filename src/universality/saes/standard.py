"""ReLU SAE with an L1 penalty weighted by decoder norms (Conerly et al. 2024, "Update on how we train SAEs").

    codes = relu((x - b_dec) @ W_enc + b_enc)
    loss  = mean |x - x_hat|^2  +  lambda * mean sum_i codes_i |W_dec_i|

Decoder rows are free; at the start they have norm 0.1. Theirs encodes x itself; here b_dec, which starts at the mean,
is subtracted first, as sae-lens does.
"""

import torch

from universality.saes.base import Step, squared_error
from universality.saes.resampling import ResampledSAE
from universality.saes.settings import ReluL1Settings
from universality.saes.sparse.selection import above


class StandardSAE(ResampledSAE):
    architecture = "standard"
    unit_norm_decoder = False
    decoder_norm = 0.1
    settings: ReluL1Settings

    def select(self, x):
        return self.selected(x, above)

    def kept(self, pre):
        return 1.0

    def values(self, entries):
        return torch.relu(entries.pre)

    def loss(self, x, target, entries, sparsity_warmth):
        values = self.values(entries)
        x_hat = self.reconstruct(x, entries, values)
        penalty = (values * entries.of_feature(entries.row_norms(self.W_dec))).sum() / entries.n_rows
        loss = squared_error(target, x_hat) + self.settings.l1_coefficient * sparsity_warmth * penalty
        return Step(loss, entries, values, x_hat)
