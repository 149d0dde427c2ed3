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
        self.W_enc.copy_(self.W_dec.T)

    @torch.no_grad()
    def after_step(self, step):
        super().after_step(step)
        self._normalise()

    def site_norms(self) -> torch.Tensor:
        """|W_dec_s,i| [F, S], every site in units of its own mean norm, which is sqrt(width) over its scale."""
        units = torch.tensor([scale / width**0.5 for scale, width in zip(self.scales, self.widths, strict=True)])
        return self._norms() * units

    @torch.no_grad()
    def rescale(self, in_scale, out_scale):
        super().rescale(in_scale, out_scale)
        sites = torch.as_tensor(out_scale).expand(self.d_out).split(self.widths)
        self.scales = [scale * float(site[0]) for scale, site in zip(self.scales, sites, strict=True)]

    def _normalise(self) -> None:
        self.W_dec.div_(self._norms().sum(1, keepdim=True).clamp_min(1e-30))

    def _norms(self) -> torch.Tensor:
        return torch.stack([part.norm(dim=1) for part in self.W_dec.detach().split(self.widths, dim=1)], dim=1)
