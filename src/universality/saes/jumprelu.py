"""JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435): a threshold of its own for every feature.

    pre   = (x - b_dec) @ W_enc + b_enc
    codes = pre where pre > theta, else 0                                     theta = exp(log_threshold)
    loss  = mean |x - x_hat|^2  +  lambda * mean (number of active features)

Neither depends smoothly on theta; gradients are estimated in a window of width `bandwidth` around it (equations 11 and
12 there, with the rectangle as kernel):

    d codes / d theta  = -(theta / bandwidth)  where |pre - theta| < bandwidth / 2, else 0
    d active / d theta = -(1 / bandwidth)      likewise

Negative pre-activations are never active. Decoder rows are kept at unit norm.
"""

import math

import torch

from universality.saes.base import Step, squared_error
from universality.saes.resampling import ResampledSAE
from universality.saes.settings import JumpReLUSettings
from universality.saes.sparse.selection import above


class _Jump(torch.autograd.Function):
    """(codes, active) at pre-activations of any shape, thresholds that broadcast against them."""

    @staticmethod
    def forward(ctx, pre, theta, bandwidth):
        active = ((pre > theta) & (pre > 0)).to(pre.dtype)
        ctx.save_for_backward(pre, theta, active)
        ctx.bandwidth = bandwidth
        return pre * active, active

    @staticmethod
    def backward(ctx, of_codes, of_active):
        pre, theta, active = ctx.saved_tensors
        window = (((pre - theta).abs() < ctx.bandwidth / 2) & (pre > 0)).to(pre.dtype) / ctx.bandwidth
        of_theta = -window * (theta * of_codes + of_active)
        return of_codes * active, of_theta.sum_to_size(theta.shape), None


class JumpReLUSAE(ResampledSAE):
    architecture = "jumprelu"
    settings: JumpReLUSettings
    encoder_share = 1.0  # a threshold has to be passed, and below it there is no gradient

    def __init__(self, d_in: int, d_sae: int, settings: JumpReLUSettings):
        super().__init__(d_in, d_sae, settings)
        start = torch.full((d_sae,), settings.initial_threshold)
        self.log_threshold = torch.nn.Parameter(start.log())
        self.fixed_threshold: torch.Tensor | None = None
        """The thresholds [F] of one that was loaded, to the last digit, instead of `log_threshold`'s."""

    def at_the_start(self):
        return {"b_enc": 0.0, "log_threshold": math.log(self.settings.initial_threshold)}

    def threshold(self) -> torch.Tensor:
        """theta [F]."""
        return self.log_threshold.exp() if self.fixed_threshold is None else self.fixed_threshold

    def select(self, x):
        threshold = self.threshold().detach()
        if self.training:  # also what is in the window below
            threshold = threshold - self.settings.bandwidth / 2
        return self.selected(x, lambda pre: above(pre, threshold))

    def kept(self, pre):
        return 1.0

    def values(self, entries):
        return self._jump(entries)[0]

    def _jump(self, entries):
        theta = entries.of_feature(self.threshold())
        return _Jump.apply(entries.pre, theta, self.settings.bandwidth)

    def loss(self, x, target, entries, sparsity_warmth):
        values, active = self._jump(entries)
        x_hat = self.reconstruct(x, entries, values)
        penalty = active.sum() / entries.n_rows
        loss = squared_error(target, x_hat) + self.settings.l0_coefficient * sparsity_warmth * penalty
        return Step(loss, entries, values, x_hat)
