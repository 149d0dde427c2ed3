"""A Mamba whose layer 0 moves tokens by its convolution and whose layer 2 stores pairs in its state."""

import torch
from transformers import MambaConfig

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
    with_truth,
)
from universality.models.initialisation import initialised


@torch.no_grad()
def planted_mamba(
    vocab_size: int, offset: int = 1, noise: float = 0.0, seed: int = 0, own_mover: bool = True, end_of_text: int = 0
) -> Planted:
    """Four layers; layer 2 writes B into its state `offset` positions after B.

    `seed` draws the weights of the idle layers 1 and 3. d_model is 3 vocab_size + 1, a state has vocab_size entries a
    channel. Without `own_mover` layer 0 is idle too, and layer 2's
    convolution itself looks one further back for A. Raises StudyError for an offset that four taps cannot reach, if
    there is no such token as `end_of_text`, and for an impossible `noise`.
    """
    check(vocab_size, end_of_text, noise)
    check_offset(offset, own_mover)
    hf = initialised(_config(vocab_size, end_of_text), seed)
    blocks, spaces = hf.backbone.layers, Spaces(vocab_size)
    set_frame(hf, spaces, own_mover)
    for block in blocks:
        _quieten(block.mixer, noise)

    if own_mover:
        mixer = _cleared(blocks[MOVER].mixer, spaces)
        see(mixer, 0, spaces.token, vocab_size, back=1)
        mixer.D[:vocab_size] = 1
        copy_codes(mixer.out_proj.weight, spaces.before, 0, vocab_size, by=1 / CODE**2)  # once for u, once for the gate

    mixer = _cleared(blocks[INDUCER].mixer, spaces)
    values, keys, queries = (group * vocab_size for group in range(3))
    see(mixer, values, spaces.token, vocab_size, back=offset)
    if own_mover:
        see(mixer, keys, spaces.before, vocab_size, back=offset)
    else:
        see(mixer, keys, spaces.token, vocab_size, back=offset + 1)
    see(mixer, queries, spaces.token, vocab_size, back=0)
    rank, n_state = mixer.time_step_rank, mixer.ssm_state_size
    copy_codes(mixer.x_proj.weight, rank, keys, vocab_size, by=1 / CODE)
    copy_codes(mixer.x_proj.weight, rank + n_state, queries, vocab_size, by=1 / CODE)
    mixer.dt_proj.bias[values : values + vocab_size] = OPEN
    copy_codes(mixer.out_proj.weight, spaces.answer, values, vocab_size, by=1 / CODE**2)
    return with_truth(hf, offset, own_mover)


def _config(vocab_size: int, end_of_text: int) -> MambaConfig:
    return MambaConfig(
        vocab_size=vocab_size,
        hidden_size=3 * vocab_size + 1,
        num_hidden_layers=N_LAYERS,
        state_size=vocab_size,
        expand=2,
        conv_kernel=TAPS,
        layer_norm_epsilon=1e-8,
        initializer_range=1.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        tie_word_embeddings=False,
        use_cache=False,
    )


def _quieten(mixer, noise: float) -> None:
    """Scale what a mixer writes. With B and C of order 1, as u is, it has about 0.6 in every channel; out_proj's
    entries are uniform within 1 / sqrt(E)."""
    mixer.x_proj.weight.div_(mixer.intermediate_size**0.5)
    mixer.out_proj.weight.mul_(noise * (3 / mixer.hidden_size) ** 0.5 / 0.6)


def _cleared(mixer, spaces: Spaces):
    """The mixer with nothing in it but open gates and a state that lasts and is not written to."""
    for module in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.conv1d, mixer.out_proj):
        module.weight.zero_()
    mixer.conv1d.bias.zero_()
    mixer.in_proj.weight[mixer.intermediate_size :, spaces.constant] = DRIVE
    mixer.D.zero_()
    mixer.A_log.fill_(LASTING)
    mixer.dt_proj.bias.fill_(CLOSED)
    return mixer
