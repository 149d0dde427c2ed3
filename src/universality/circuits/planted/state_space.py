"""What planted Mamba and Mamba-2 have in common: layers, spaces of the stream, and everything around the mixers.

Spaces, each as wide as the vocabulary: token, token before, answer; then one constant entry, from which gates that are
always open are read. The mover's convolution looks one back, and its skip passes on what it sees. The inducer's state
has an entry for every token before: B is the code of the token before, u that of the token, both seen `offset` back by
the convolution, and C the code of the present token, so that A reads what came after A. Other channels have steps of
almost 0, and write nothing.
"""

import torch.nn.functional as F
from torch import nn, tensor

from universality.circuits.component import Component
from universality.circuits.planted.base import LOGIT, Planted, copy_codes
from universality.errors import StudyError
from universality.models.language_model import LanguageModel

MOVER, INDUCER = 0, 2
TAPS = 4
DRIVE = 8.0
"""Into SiLU for a code that is there: it comes out all but unchanged, and 0 stays 0."""
CODE = F.silu(tensor(DRIVE)).item()
OPEN, CLOSED = 0.5413248546129181, -20.0
"""Biases of steps: softplus makes 1 of the one and 2e-9 of the other."""
LASTING = -12.0
"""Logarithm of a rate of decay: of a state, 6e-6 is lost at a step of 1."""


class Spaces:
    """Where in the stream the codes of a vocabulary of this size begin."""

    def __init__(self, vocab_size: int):
        self.token, self.before, self.answer, self.constant = (space * vocab_size for space in range(4))


def check_offset(offset: int, own_mover: bool) -> None:
    """Raises StudyError for an offset at which the inducer's convolution cannot see A and B."""
    farthest = TAPS - 1 if own_mover else TAPS - 2
    if not 0 <= offset <= farthest:
        raise StudyError(f"offset: {offset} is out of the convolution's reach; allowed: 0 to {farthest}")


def set_frame(hf: nn.Module, spaces: Spaces, own_mover: bool) -> None:
    """Embedding, unembedding and norms. At every position stand the token, the constant and, once moved, the token
    before; the last norm sees the answer as well."""
    stack, vocab_size = hf.backbone, hf.config.vocab_size
    stack.embeddings.weight.zero_()
    copy_codes(stack.embeddings.weight.T, spaces.token, 0, vocab_size)
    stack.embeddings.weight[:, spaces.constant] = 1
    hf.lm_head.weight.zero_()
    copy_codes(hf.lm_head.weight, 0, spaces.answer, vocab_size, by=LOGIT)
    codes = 3 if own_mover else 2
    for layer, block in enumerate(stack.layers):
        undo_rms(block.norm, codes if layer > MOVER else 2)
    undo_rms(stack.norm_f, codes + 1)


def undo_rms(norm: nn.Module, codes: int) -> None:
    """Have an RMS norm hand on so many entries of one size as 1: it divides that size by sqrt(codes / width)."""
    norm.weight.fill_((codes / len(norm.weight)) ** 0.5)


def see(mixer: nn.Module, channel: int, space: int, count: int, back: int, first_row: int = 0) -> None:
    """`count` channels of the convolution from `channel` on see a space's codes as they stood `back` positions before.

    `first_row`: the row of the input projection that the first channel is.
    """
    copy_codes(mixer.in_proj.weight, first_row + channel, space, count)
    mixer.conv1d.weight[channel : channel + count, 0, TAPS - 1 - back] = DRIVE


def with_truth(hf: nn.Module, offset: int, own_mover: bool) -> Planted:
    mover = Component(f"mamba.{MOVER if own_mover else INDUCER}.y")
    model = LanguageModel(hf.eval().requires_grad_(False))
    return Planted(model, mover, Component(f"mamba.{INDUCER}.state@-1"), offset)
