"""Two runs up to their last position, against the model itself run twice."""

import numpy as np
import pytest
import torch

from tests.conftest import tiny_model
from universality.errors import StudyError
from universality.models.last_positions import last_positions
from universality.models.single_step import STEPS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LENGTH = 11


@pytest.fixture(params=list(STEPS))
def model(request):
    return tiny_model(request.param)


def prompts(length: int, parts_at: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each sequence the two tokens at `parts_at` differ, and some after it."""
    torch.manual_seed(0)
    clean = torch.randint(0, 50, (len(parts_at), length))
    corrupted = clean.clone()
    for row, at in enumerate(parts_at):
        corrupted[row, at::2] = (clean[row, at::2] + 1) % 50
    return clean, corrupted


@pytest.mark.parametrize("length", [2, 3, 9, LENGTH, 21])  # fewer and more than the convolution looks back
def test_everything_at_the_last_position_is_what_the_model_has(model, length):
    """Runs that part at the first token, at equal places, at the last one, and never."""
    pair = prompts(length, [min(at, length) for at in (0, 5, length - 1, 1, 5, length, 2, 9, 17)])
    kinds = ("state@-1", "y", "delta", "gate")
    with torch.inference_mode():
        for tokens, found in zip(pair, last_positions(model, *pair), strict=True):
            run = model.run(tokens, capture=[f"mamba.{n}.{kind}" for n in range(2) for kind in kinds])
            for layer in range(2):
                inputs = found.inputs[layer]
                values = (found.state(layer), found.y[layer], inputs.delta, inputs.gate)
                for kind, value in zip(kinds, values, strict=True):
                    expected = run.captured[f"mamba.{layer}.{kind}"]
                    torch.testing.assert_close(value[0], expected if "@" in kind else expected[:, -1], **CLOSE)
                read = found.steps[layer].output(inputs, found.before[layer])
                torch.testing.assert_close(read, found.y[layer], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model.unembed(found.final), run.logits[:, -1], **CLOSE)


@pytest.mark.parametrize("parts_at", [0, LENGTH], ids=["nothing shared", "all shared"])
def test_prompts_may_share_nothing_or_all(model, parts_at):
    pair = prompts(LENGTH, [parts_at] * 3)
    with torch.inference_mode():
        for tokens, found in zip(pair, last_positions(model, *pair), strict=True):
            torch.testing.assert_close(model.unembed(found.final), model.run(tokens).logits[:, -1], **CLOSE)


def test_kernels_and_the_plain_form_hand_over_the_same(model):
    """Sequences of several lengths in parts of several lengths, some of none, against each in one go."""
    torch.manual_seed(1)
    step = STEPS[model.family.name](model, 0)
    lengths = [LENGTH, 5, 8]
    parts = [(0, 0, 0), (1, 0, 8), (6, 0, 0), (0, 2, 0), (4, 3, 0)]  # of each sequence, one after the other
    with torch.inference_mode():
        sequences = [step.projected(torch.randn(length, model.d_model)) for length in lengths]
        found, carried, done = [[] for _ in lengths], None, [0] * len(lengths)
        for part in parts:
            pieces = [x[at : at + n] for x, at, n in zip(sequences, done, part, strict=True)]
            rows, starts = torch.cat(pieces), torch.tensor([0, *np.cumsum(part)])
            before = rows.new_zeros(3, 3, step.conv_in(rows).shape[1]) if carried is None else carried.conv
            state = None if carried is None else carried.state_t.mT
            plain, gated = (torch.empty(len(rows), step.mixer.intermediate_size) for _ in range(2))
            plain_state = step._run_plainly(rows, starts, before, state, plain)
            carried = step.run(rows, starts, gated, carried)
            torch.testing.assert_close(gated, plain, **CLOSE)
            torch.testing.assert_close(carried.state_t.mT, plain_state, **CLOSE)
            for kept, values in zip(found, gated.split(part), strict=True):
                kept.append(values)
            done = [at + n for at, n in zip(done, part, strict=True)]
        for n, (rows, kept) in enumerate(zip(sequences, found, strict=True)):
            whole = torch.empty(len(rows), step.mixer.intermediate_size)
            end = step.run(rows, torch.tensor([0, len(rows)]), whole)
            torch.testing.assert_close(torch.cat(kept), whole, **CLOSE)
            torch.testing.assert_close(carried.state_t[n], end.state_t[0], **CLOSE)
            torch.testing.assert_close(carried.conv[n], step.conv_in(rows)[-3:])


def test_what_cannot_be_run_so_is_told():
    tokens = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(StudyError, match="gpt_neox: has no single steps; those that have: mamba, mamba2"):
        last_positions(tiny_model("gpt_neox"), tokens, tokens)
    with pytest.raises(StudyError, match="tokens: the last position has none before it"):
        last_positions(tiny_model("mamba"), tokens, tokens)
