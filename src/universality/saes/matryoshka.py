"""Matryoshka SAE (Bussmann et al. 2025, arXiv 2503.17547), on BatchTopK: nested dictionaries that each reconstruct.

    loss  = sum_m mean |x - x_hat_m|^2  +  the auxiliary loss of dead features

where x_hat_m uses the first m features alone, for each prefix m and for all features; codes are BatchTopK's.
"""

from universality.saes.base import Step, squared_error
from universality.saes.batch_topk import BatchTopKSAE
from universality.saes.settings import MatryoshkaSettings


class MatryoshkaSAE(BatchTopKSAE):
    architecture = "matryoshka_batchtopk"
    settings: MatryoshkaSettings

    def loss(self, x, target, entries, sparsity_warmth):
        values = self.values(entries)
        x_hat, loss = self.b_dec, 0.0
        ends = [*self.settings.prefixes, self.d_sae]
        for low, high in zip([0, *ends], ends, strict=False):
            part, part_values = entries.part(values, low, high)
            x_hat = x_hat + part.decode(part_values, self.W_dec)
            loss = loss + squared_error(target, x_hat)
        return self.with_auxiliary(x, target, Step(loss, entries, values, x_hat))
