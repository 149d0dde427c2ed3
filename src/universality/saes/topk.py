"""TopK SAE (Gao et al. 2024, arXiv 2406.04093).

    codes = relu(top_k((x - b_dec) @ W_enc + b_enc))
    loss  = mean |x - x_hat|^2  +  alpha * mean |(x - x_hat) - e_hat|^2

where e_hat, the auxiliary reconstruction of the error, uses the k_aux largest pre-activations of dead features only
(section A.2 there), so that dead features get gradients. Decoder rows are kept at unit norm.
"""

import torch

from universality.saes.base import SAE
from universality.saes.settings import TopKSettings


class TopKSAE(SAE):
    architecture = "topk"

    def __init__(self, d_in: int, d_sae: int, settings: TopKSettings):
        super().__init__(d_in, d_sae)
        self.settings = settings
        self.steps_since_fired = torch.zeros(d_sae, dtype=torch.int64)

    def activate(self, pre: torch.Tensor) -> torch.Tensor:
        return _keep_largest(pre, self.settings.k)

    def loss(self, x: torch.Tensor, warmth: float) -> tuple[torch.Tensor, torch.Tensor]:
        pre = self.pre_activations(x)
        codes = self.activate(pre)
        error = x - self.decode(codes)
        loss = error.square().sum(-1).mean()
        self.steps_since_fired += 1
        self.steps_since_fired[(codes.detach() > 0).any(0)] = 0
        dead = self.steps_since_fired > self.settings.dead_steps
        if dead.any():
            k_aux = min(self.settings.k_aux, int(dead.sum()))
            revived = _keep_largest(pre[:, dead], k_aux)
            loss = loss + self.settings.aux_coefficient * _aux_loss(error.detach(), revived @ self.W_dec[dead])
        return loss, codes

    @torch.no_grad()
    def after_step(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    def config(self) -> dict:
        return {"k": self.settings.k, "rescale_acts_by_decoder_norm": False}


def _keep_largest(pre: torch.Tensor, k: int) -> torch.Tensor:
    values, indices = torch.topk(pre, k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, indices, torch.relu(values))


def _aux_loss(error: torch.Tensor, error_hat: torch.Tensor) -> torch.Tensor:
    return (error - error_hat).square().sum(-1).mean()
