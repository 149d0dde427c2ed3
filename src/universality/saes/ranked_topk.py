"""TopK as only other libraries train it: dictionaries to read and to encode with.

    codes = relu(pre) where rank * pre is among the k largest of the row, else 0

`rank` [F] is the norm of decoder rows in OpenMOSS' SAEs: features compete by what they add to the reconstruction. A
TopKTranscoder predicts another site. sae-lens knows neither: its TopK SAE competes likewise with
`rescale_acts_by_decoder_norm`, but its codes are then rank * pre.
"""

import numpy as np
import torch

from universality.saes.settings import TopKSettings
from universality.saes.sparse.selection import Selected, top_of_rows
from universality.saes.topk import TopKSAE
from universality.saes.transcoder import PredictsTarget


class RankedTopKSAE(TopKSAE):
    architecture = "ranked_topk"
    rank: torch.Tensor

    def __init__(self, d_in: int, d_sae: int, settings: TopKSettings, d_out: int | None = None):
        super().__init__(d_in, d_sae, settings, d_out)
        self.register_buffer("rank", torch.ones(d_sae))

    def select(self, x):
        def choose(pre: torch.Tensor) -> Selected:
            pattern, _ = top_of_rows(pre * self.rank, self.settings.k)
            rows = np.repeat(np.arange(pattern.n_rows), np.diff(pattern.starts))
            return pattern, pre[torch.from_numpy(rows), pattern.index]

        return self.selected(x, choose)

    def kept(self, pre):
        return super().kept(pre * self.rank)


class TopKTranscoder(PredictsTarget, RankedTopKSAE):
    architecture = "topk_transcoder"
    encoder_centred = False

    def __init__(self, d_in: int, d_sae: int, settings: TopKSettings, d_out: int, skip: bool):
        super().__init__(d_in, d_sae, settings, d_out)
        self.set_skip(skip)
