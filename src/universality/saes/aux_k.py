"""The auxiliary loss that brings dead features back (Gao et al. 2024, arXiv 2406.04093, section A.2).

    alpha * mean |(x - x_hat) - e_hat|^2

where e_hat, a reconstruction of the error, uses the k_aux largest pre-activations of dead features only, so that dead
features get gradients, and nothing else does.
"""

import torch

from universality.saes.base import SAE, Step, squared_error
from universality.saes.entries import Entries, product
from universality.saes.settings import AuxKSettings


class AuxKSAE(SAE):
    """Base of the variants that keep a number of features."""

    always_sparse = True

    def __init__(self, d_in: int, d_sae: int, settings: AuxKSettings, d_out: int | None = None):
        super().__init__(d_in, d_sae, d_out)
        self.settings = settings

    def values(self, entries):
        return torch.relu(entries.pre) * entries.kept

    def loss(self, x, target, entries, sparsity_warmth):
        values = self.values(entries)
        x_hat = self.reconstruct(x, entries, values)
        return self.with_auxiliary(x, target, Step(squared_error(target, x_hat), entries, values, x_hat))

    def with_auxiliary(self, x: torch.Tensor, target: torch.Tensor, step: Step) -> Step:
        """`step` with the auxiliary loss added to its loss."""
        dead = self.dead()
        if not len(dead) or not self.settings.aux_coefficient:
            return step
        error = (target - step.x_hat).detach()
        loss = squared_error(error, self._from_dead(x, dead, step.entries))
        return step._replace(loss=step.loss + self.settings.aux_coefficient * loss)

    def _from_dead(self, x: torch.Tensor, dead: torch.Tensor, entries: Entries) -> torch.Tensor:
        """e_hat [B, d_out]. Products over the dead features alone are dense: k_aux is a large part of them."""
        centred = x - self.b_dec.detach() if self.encoder_centred else x
        encoder = entries.rows(self.W_enc, dead, transposed=True)
        codes = torch.relu(product(centred, encoder.T, self.products) + self.b_enc[dead])
        if self.settings.k_aux < len(dead):
            largest = torch.topk(codes.detach(), self.settings.k_aux, dim=-1, sorted=False).indices
            codes = codes * torch.zeros_like(codes).scatter_(-1, largest, 1.0)
        return product(codes, entries.rows(self.W_dec, dead), self.products)
