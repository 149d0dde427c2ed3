"""ReLU SAE with an L1 penalty weighted by decoder norms (Conerly et al. 2024, "Update on how we train SAEs").

codes = relu((x - b_dec) @ W_enc + b_enc)
loss  = mean |x - x_hat|^2  +  lambda * mean sum_i codes_i * |W_dec_i|
"""

import torch

from universality.saes.base import SAE
from universality.saes.settings import ReluL1Settings


class StandardSAE(SAE):
    architecture = "standard"

    def __init__(self, d_in: int, d_sae: int, settings: ReluL1Settings):
        super().__init__(d_in, d_sae)
        self.settings = settings

    def activate(self, pre: torch.Tensor) -> torch.Tensor:
        return torch.relu(pre)

    def loss(self, x: torch.Tensor, warmth: float) -> tuple[torch.Tensor, torch.Tensor]:
        codes = self.encode(x)
        reconstruction = (x - self.decode(codes)).square().sum(-1).mean()
        penalty = (codes @ self.W_dec.norm(dim=1)).mean()
        return reconstruction + self.settings.l1_coefficient * warmth * penalty, codes
