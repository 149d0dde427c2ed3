"""BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410): as many active features as TopK, but shared out over a batch.

    codes = the k B largest of relu((x - b_dec) @ W_enc + b_enc) over the B tokens of a batch
    loss  = mean |x - x_hat|^2  +  the auxiliary loss of dead features

Outside training a token is to be encoded without its batch: codes are then what exceeds `threshold`, the running mean
of the smallest code of each batch. Stored as the JumpReLU SAE that this is.
"""

import torch

from universality.saes.aux_k import AuxKSAE
from universality.saes.sparse.selection import above, top_of_batch

_THRESHOLD_RATE = 0.01  # of the running mean, as sae-lens has it; over fewer batches it is their mean


class BatchTopKSAE(AuxKSAE):
    architecture = "batchtopk"

    def __init__(self, d_in, d_sae, settings, d_out=None):
        super().__init__(d_in, d_sae, settings, d_out)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))

    def select(self, x):
        if not self.training:
            return self.selected(x, lambda pre: above(pre, self.threshold))
        return top_of_batch(self.pre_chunks(x), self.settings.k, len(x))

    def kept(self, pre):
        if not self.training:
            return (pre > self.threshold).to(pre.dtype)
        n = min(self.settings.k * len(pre), pre.numel())
        largest = torch.topk(pre.flatten(), n, sorted=False).indices
        return torch.zeros(pre.numel(), dtype=pre.dtype).scatter_(0, largest, 1.0).view_as(pre)

    @torch.no_grad()
    def after_step(self, step):
        super().after_step(step)
        positive = step.values[step.values > 0]
        if len(positive):
            self.batches_seen += 1
            self.threshold.lerp_(positive.min(), max(_THRESHOLD_RATE, 1 / int(self.batches_seen)))
