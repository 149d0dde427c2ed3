"""Features that never fire begin anew (Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling").

Every `resample_steps` steps, each dead feature takes the direction of the residual x - x_hat of an input, drawn with
probability proportional to the square of its loss: the decoder row points there, the encoder's column too, at a fifth
of the mean norm of the columns of features that live; the encoder's bias is zero. (The residual rather than the input,
whose direction other features reconstruct already.)
"""

import torch

from universality.saes.base import SAE, Step
from universality.saes.settings import ResampledSettings

_ENCODER_SHARE = 0.2


class ResampledSAE(SAE):
    """Base of the variants with a penalty."""

    def __init__(self, d_in: int, d_sae: int, settings: ResampledSettings):
        super().__init__(d_in, d_sae)
        self.settings = settings

    @torch.no_grad()
    def resample(self, target: torch.Tensor, step: Step, generator: torch.Generator) -> torch.Tensor:
        """Let dead features begin anew, from the residuals of a batch; the features [n] that did."""
        dead = self.dead()
        residual = target - step.x_hat
        losses = residual.square().sum(-1).double().square()
        if not len(dead) or len(dead) == self.d_sae or not bool(losses.sum() > 0):
            return dead[:0]
        chosen = torch.multinomial(losses, len(dead), replacement=True, generator=generator)
        directions = torch.nn.functional.normalize(residual[chosen])
        alive = torch.ones(self.d_sae, dtype=torch.bool)
        alive[dead] = False
        encoder = self.W_enc.T
        encoder[dead] = directions * _ENCODER_SHARE * encoder[alive].norm(dim=1).mean()
        self.W_dec[dead] = directions * self.W_dec[alive].norm(dim=1).mean()
        self.b_enc[dead] = 0.0
        self.steps_since_fired[dead] = 0
        return dead
