"""A Mamba-2 with the circuit of the planted Mamba, in head 0 of its layers.

A mixer's output passes a norm. One channel of head 1 is constant and as large as a code, so that this norm makes no
more of small values where there is no code than where there is one.
"""

import torch
from transformers import Mamba2Config

from universality.circuits.planted.base import N_LAYERS, Planted, check, copy_codes
from universality.circuits.planted.state_space import (
    CLOSED,
    CODE,
    DRIVE,
    INDUCER,
    LASTING,
    MOVER,
    OPEN,
    TAPS,
    Spaces,
    check_offset,
    see,
    set_frame,
    undo_rms,
    with_truth,
)
from universality.models.initialisation import initialised

_N_HEADS = 8


@torch.no_grad()
def planted_mamba2(
    vocab_size: int, offset: int = 1, noise: float = 0.0, seed: int = 0, own_mover: bool = True, end_of_text: int = 0
) -> Planted:
    """As planted_mamba, with d_model 4 vocab_size and 8 heads of vocab_size channels."""
    check(vocab_size, end_of_text, noise)
    check_offset(offset, own_mover)
    hf = initialised(_config(vocab_size, end_of_text), seed)
    blocks, spaces = hf.backbone.layers, Spaces(vocab_size)
    set_frame(hf, spaces, own_mover)
    for block in blocks:  # the mixer's norm makes 1 of every channel; out_proj is uniform within 1 / sqrt(E)
        block.mixer.out_proj.weight.mul_(noise * (3 / hf.config.hidden_size) ** 0.5)

    if own_mover:
        mixer = _cleared(blocks[MOVER].mixer, spaces, constant=CODE)
        inner = mixer.intermediate_size
        see(mixer, 0, spaces.token, vocab_size, back=1, first_row=inner)
        mixer.D[0] = 1
        copy_codes(mixer.out_proj.weight, spaces.before, 0, vocab_size)

    mixer = _cleared(blocks[INDUCER].mixer, spaces, constant=CODE**3)  # u, B and C are CODE each
    inner = mixer.intermediate_size
    see(mixer, 0, spaces.token, vocab_size, back=offset, first_row=inner)
    if own_mover:
        see(mixer, inner, spaces.before, vocab_size, back=offset, first_row=inner)
    else:
        see(mixer, inner, spaces.token, vocab_size, back=offset + 1, first_row=inner)
    see(mixer, inner + mixer.ssm_state_size, spaces.token, vocab_size, back=0, first_row=inner)
    mixer.dt_bias[0] = OPEN
    copy_codes(mixer.out_proj.weight, spaces.answer, 0, vocab_size)
    return with_truth(hf, offset, own_mover)


def _config(vocab_size: int, end_of_text: int) -> Mamba2Config:
    return Mamba2Config(
        vocab_size=vocab_size,
        hidden_size=4 * vocab_size,
        num_hidden_layers=N_LAYERS,
        state_size=vocab_size,
        expand=2,
        num_heads=_N_HEADS,
        head_dim=vocab_size,
        n_groups=1,
        conv_kernel=TAPS,
        chunk_size=64,
        layer_norm_epsilon=1e-8,
        initializer_range=1.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        tie_word_embeddings=False,
        use_cache=False,
    )


def _cleared(mixer, spaces: Spaces, constant: float):
    """The mixer with nothing in it but open gates, a state that lasts and is not written to, and the constant."""
    for module in (mixer.in_proj, mixer.conv1d, mixer.out_proj):
        module.weight.zero_()
    inner, head_1 = mixer.intermediate_size, mixer.head_dim
    mixer.conv1d.bias.zero_()
    mixer.in_proj.weight[:inner, spaces.constant] = DRIVE  # the gates come first, then what is convolved
    see(mixer, head_1, spaces.constant, 1, back=0, first_row=inner)
    mixer.conv1d.weight[head_1, 0, -1] = constant
    mixer.D.zero_()
    mixer.D[1] = 1
    mixer.A_log.fill_(LASTING)
    mixer.dt_bias.fill_(CLOSED)
    undo_rms(mixer.norm, 2)
    return mixer
