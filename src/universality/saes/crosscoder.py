"""Crosscoder (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing"): one dictionary
over the sites of several models, in the BatchTopK form of Minder et al. 2025 (arXiv 2504.02922).

    pre   = sum_s x_s @ W_enc_s + b_enc
    codes = the k B largest of relu(pre) over the batch
    x_hat_s = codes @ W_dec_s + b_dec_s
    loss  = sum_s mean |x_s - x_hat_s|^2  +  the auxiliary loss of dead features

Sites lie side by side: x is [B, sum of widths], and so are the rows of W_dec. There features are compared by
their codes times sum_s |W_dec_s,i|; here that sum is kept at 1, so that the codes alone are compared, and how strongly
a feature writes to each site is its share:

    share_s,i = |W_dec_s,i| / sum_s |W_dec_s,i|         0 or 1: of one model only; between: shared
"""

import torch

from universality.saes.batch_topk import BatchTopKSAE
from universality.saes.settings import CrosscoderSettings


class Crosscoder(BatchTopKSAE):
    architecture = "crosscoder"
    encoder_centred = False
    unit_norm_decoder = False

    def __init__(self, widths: list[int], d_sae: int, settings: CrosscoderSettings):
        super().__init__(sum(widths), d_sae, settings)
        self.widths = widths
        self.scales = [1.0] * len(widths)
        """What each site is multiplied by to the units that its norms are compared in."""

    @torch.no_grad()
    def initialise(self, mean, generator):
        super().initialise(mean, generator)
        self._normalise()

    @torch.no_grad()
    def after_step(self, step):
        super().after_step(step)
        self._normalise()

    def site_norms(self) -> torch.Tensor:
        """|W_dec_s,i| [F, S], every site in units of its own mean norm."""
        parts = self.W_dec.detach().split(self.widths, dim=1)
        return torch.stack([part.norm(dim=1) * scale for part, scale in zip(parts, self.scales, strict=True)], dim=1)

    def _normalise(self) -> None:
        self.W_dec.div_(self.site_norms().sum(1, keepdim=True).clamp_min(1e-30))
