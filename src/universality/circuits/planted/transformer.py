"""A GPT-2 with one previous-token head and one induction head (Olsson et al. 2022, arXiv 2209.11895).

Spaces of the stream, each one head wide: token, token before, answer, position. The last entry of each is minus the sum
of the others, so that a layer norm's mean is 0. Where the induction head finds nothing it looks at position 0, whose
end-of-text token has no value.
"""

import torch
from transformers import GPT2Config

from universality.circuits.component import Component
from universality.circuits.planted.base import LOGIT, N_LAYERS, Planted, check, copy_codes
from universality.errors import StudyError
from universality.models.initialisation import initialised
from universality.models.language_model import LanguageModel

MOVER = (0, 2)
INDUCER = (2, 1)
_N_HEADS = 4
_SCORE = 24.0
"""Of a match, before the softmax: what does not match gets e^-24 of the attention."""
_CODE = 2.0
"""Squared length of a code: 1 and, in the last entry, -1."""


@torch.no_grad()
def planted_transformer(
    vocab_size: int, length: int, noise: float = 0.0, seed: int = 0, end_of_text: int = 0
) -> Planted:
    """Four layers of four heads for sequences of at most `length` tokens; L0H2 moves, L2H1 induces.

    `seed` draws the weights of all other heads and of the MLPs. d_model is 4 (max(vocab_size, length) + 1).
    Raises StudyError if there is no such token as `end_of_text`, or for impossible numbers.
    """
    check(vocab_size, end_of_text, noise)
    if length < 1:
        raise StudyError(f"length: {length} is not at least 1")
    width = max(vocab_size, length) + 1
    hf = initialised(_config(vocab_size, length, width, end_of_text), seed)
    token, before, answer, position = (space * width for space in range(4))

    stack = hf.transformer
    for table, space in ((stack.wte.weight, token), (stack.wpe.weight, position)):
        table.zero_()
        _write(table.T, space, 0, len(table), width)
    hf.lm_head.weight.zero_()
    copy_codes(hf.lm_head.weight, 0, answer, vocab_size, by=LOGIT)
    for block in stack.h:
        _quieten(block, noise, width)
    _set_norms(stack, width)

    query, key, value, written = _head(stack.h, *MOVER, width)
    copy_codes(query, 0, position, length, by=_SCORE * width**0.5)
    copy_codes(key, 1, position, length)  # position p is found by p + 1
    copy_codes(value, 0, token, vocab_size)
    _write(written, before, 0, vocab_size, width)

    query, key, value, written = _head(stack.h, *INDUCER, width)
    copy_codes(query, 0, token, vocab_size, by=_SCORE * width**0.5)
    copy_codes(key, 0, before, vocab_size)
    copy_codes(value, 0, token, vocab_size)
    value[:, token + end_of_text] = 0
    _write(written, answer, 0, vocab_size, width)
    layer, head = INDUCER
    stack.h[layer].attn.c_attn.bias[head * width + width - 1] = _SCORE / 2 * width**0.5  # half a match with position 0
    key[-1, position] = 1

    mover, inducer = (Component(f"attn.{layer}.z", head) for layer, head in (MOVER, INDUCER))
    return Planted(LanguageModel(hf.eval().requires_grad_(False)), mover, inducer, None)


def _config(vocab_size: int, length: int, width: int, end_of_text: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size,
        n_embd=_N_HEADS * width,
        n_layer=N_LAYERS,
        n_head=_N_HEADS,
        n_positions=length,
        layer_norm_epsilon=1e-8,
        initializer_range=1.0,  # idle heads attend to something rather than to everything
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        tie_word_embeddings=False,
        use_cache=False,
    )


def _quieten(block, noise: float, width: int) -> None:
    """Scale what heads and the MLP write. Their inputs have about one code's length, their weights are of order 1."""
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        projection.weight.mul_(noise * (2 * N_LAYERS) ** 0.5 / (_N_HEADS * width))  # transformers divides by the root


def _set_norms(stack, width: int) -> None:
    """A norm divides by sqrt(codes * 2 / d_model), for so many codes of squared length 2; undo it."""

    def undo(norm, codes: int) -> None:
        norm.weight.fill_((codes * _CODE / (_N_HEADS * width)) ** 0.5)

    for layer, block in enumerate(stack.h):
        undo(block.ln_1, 2 if layer <= MOVER[0] else 3)
        undo(block.ln_2, 3)
    undo(stack.ln_f, 4)


def _head(blocks, layer: int, head: int, width: int) -> list[torch.Tensor]:
    """Views of one head's matrices as [out, in], cleared: q, k, v [width, d_model], output [d_model, width]."""
    attention, d_model = blocks[layer].attn, _N_HEADS * width
    rows = slice(head * width, (head + 1) * width)
    views = [part[rows] for part in attention.c_attn.weight.T.split(d_model)]
    views.append(attention.c_proj.weight[rows].T)
    for view in views:
        view.zero_()
    return views


def _write(matrix: torch.Tensor, space: int, source: int, count: int, width: int) -> None:
    """Have a matrix [out, in] write entry i as the code i of a space: 1 there, -1 in the space's last entry."""
    copy_codes(matrix, space, source, count)
    matrix[space + width - 1, source : source + count] = -1
