"""TopK SAE (Gao et al. 2024, arXiv 2406.04093).

    codes = relu(top_k((x - b_dec) @ W_enc + b_enc))
    loss  = mean |x - x_hat|^2  +  the auxiliary loss of dead features

Decoder rows are kept at unit norm.
"""

import torch

from universality.saes.aux_k import AuxKSAE
from universality.saes.sparse.selection import top_of_rows


class TopKSAE(AuxKSAE):
    architecture = "topk"

    def select(self, x):
        return self.selected(x, lambda pre: top_of_rows(pre, self.settings.k))

    def kept(self, pre):
        largest = torch.topk(pre, self.settings.k, dim=-1, sorted=False).indices
        return torch.zeros_like(pre).scatter_(-1, largest, 1.0)
