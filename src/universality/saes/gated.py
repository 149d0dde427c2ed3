"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): one half tells which features are active, one how much.

    p     = (x - b_dec) @ W_enc
    gate  = p + b_gate
    codes = relu(p * exp(r_mag) + b_mag) where gate > 0, else 0
    loss  = mean |x - x_hat|^2  +  lambda * mean sum_i relu(gate_i)  +  mean |x - frozen(relu(gate))|^2

`frozen` decodes with W_dec and b_dec held constant. Decoder rows are kept at unit norm. `b_enc` of the base is b_gate.
"""

import torch

from universality.saes.base import Step, squared_error
from universality.saes.resampling import ResampledSAE
from universality.saes.settings import GatedSettings
from universality.saes.sparse.selection import above


class GatedSAE(ResampledSAE):
    architecture = "gated"
    settings: GatedSettings

    def __init__(self, d_in: int, d_sae: int, settings: GatedSettings):
        super().__init__(d_in, d_sae, settings)
        self.r_mag = torch.nn.Parameter(torch.zeros(d_sae))
        self.b_mag = torch.nn.Parameter(torch.zeros(d_sae))

    def at_the_start(self):
        return {"b_enc": 0.0, "r_mag": 0.0, "b_mag": 0.0}

    def select(self, x):
        return self.selected(x, above)

    def kept(self, pre):
        return (pre > 0).to(pre.dtype)

    def values(self, entries):
        projection = entries.pre - entries.of_feature(self.b_enc)
        magnitude = projection * entries.of_feature(self.r_mag.exp()) + entries.of_feature(self.b_mag)
        return torch.relu(magnitude) * entries.kept

    def loss(self, x, target, entries, sparsity_warmth):
        values, gates = self.values(entries), torch.relu(entries.pre)
        x_hat = self.reconstruct(x, entries, values)
        from_gates = entries.decode(gates, self.W_dec.detach()) + self.b_dec.detach()
        penalty = gates.sum() / entries.n_rows
        loss = squared_error(target, x_hat) + squared_error(target, from_gates)
        return Step(loss + self.settings.l1_coefficient * sparsity_warmth * penalty, entries, values, x_hat)
