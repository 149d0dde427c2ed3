"""Features that never fire begin anew (Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling").

Every `resample_steps` steps, until the learning rate begins to fall, dead features each take the direction of the
residual x - x_hat of an input of their own, drawn with probability proportional to the square of its loss: the decoder
row points there, the encoder's column too; what else a feature has is as at the start. (The residual rather than the
input, whose direction other features reconstruct already; inputs of their own, since equal features would stay equal.)
Where the decoder is frozen, the encoder's column takes the direction that the feature has there.
"""

from typing import ClassVar

import torch

from universality.saes.base import SAE, Step
from universality.saes.settings import ResampledSettings


class ResampledSAE(SAE):
    """Base of the variants with a penalty."""

    encoder_share: ClassVar[float] = 0.2
    """Norm of a new encoder column, as a share of the mean norm of those of features that live."""

    def __init__(self, d_in: int, d_sae: int, settings: ResampledSettings):
        super().__init__(d_in, d_sae)
        self.settings = settings

    def at_the_start(self) -> dict[str, float]:
        """The value at the start of every parameter that is a number a feature."""
        return {"b_enc": 0.0}

    @torch.no_grad()
    def resample(self, target: torch.Tensor, step: Step, generator: torch.Generator) -> torch.Tensor:
        """Let dead features begin anew, from the residuals of a batch; the features [n] that did."""
        dead = self.dead()
        residual = target - step.x_hat
        losses = residual.square().sum(-1).double().square()
        dead = dead[: int((losses > 0).sum())]
        alive = torch.ones(self.d_sae, dtype=torch.bool)
        alive[self.dead()] = False
        if not len(dead) or not bool(alive.any()):
            return dead[:0]
        chosen = torch.multinomial(losses, len(dead), replacement=False, generator=generator)
        directions = torch.nn.functional.normalize(residual[chosen])
        if self.frozen_decoder:
            directions = self.W_dec[dead]
        else:
            self.W_dec[dead] = directions * self.W_dec[alive].norm(dim=1).mean()
        encoder = self.W_enc.T
        encoder[dead] = directions * self.encoder_share * encoder[alive].norm(dim=1).mean()
        for name, value in self.at_the_start().items():
            getattr(self, name)[dead] = value
        self.steps_since_fired[dead] = 0
        return dead
