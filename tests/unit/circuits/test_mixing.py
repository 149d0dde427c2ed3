"""What is lost when the convolution, the state space or attention no longer reaches other positions."""

import pytest
import torch

from tests.conftest import LENGTH, tiny_model
from universality.circuits.columns import METRICS
from universality.circuits.metrics import measure
from universality.circuits.mixing import MixingCuts, choices
from universality.circuits.planted import planted_mamba, planted_mamba2, planted_transformer
from universality.circuits.tasks.induction import make_task
from universality.errors import StudyError

VOCAB = 24


@pytest.fixture(scope="module")
def task():
    return make_task(6, LENGTH, 50, end_of_text=0, seed=0)


def cuts(model, task, *arguments, batch_size=4, **keywords):
    found = MixingCuts(model, task, batch_size).cuts(*arguments, **keywords)
    return {(cut.layer, cut.ways): cut.values for cut in found}


def model_of(family: str):
    """Of weights so large that every way matters; llama's heads share keys and values in pairs."""
    model = tiny_model(family, **({"n_heads": 4, "n_kv_heads": 2} if family == "llama" else {}))
    if family == "falcon_h1":
        for block in model.blocks:
            block.mamba.conv1d.weight.mul_(5)
            block.mamba.A_log.fill_(-2)
            block.mamba.out_proj.weight.mul_(5)
    model.hf.get_output_embeddings().weight.mul_(10)
    return model


def metrics(model, task, **keywords):
    return measure(model.run(task.clean, **keywords).logits[:, -1], task)


def mixer_of(block):
    return block.mamba if hasattr(block, "mamba") else block.mixer


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1"])
def test_zeros_are_a_model_of_one_tap_and_of_states_that_are_lost_at_once(family, task):
    found = cuts(model_of(family), task, "zero")
    clean = found[None, ()]
    torch.testing.assert_close(clean, metrics(model_of(family), task))
    for layer in (None, 0, 1):
        for ways in (("conv",), ("ssm",), ("conv", "ssm")):
            model = model_of(family)
            for block in model.blocks if layer is None else [model.blocks[layer]]:
                if "conv" in ways:
                    mixer_of(block).conv1d.weight[..., :-1] = 0
                if "ssm" in ways:
                    mixer_of(block).A_log.fill_(20)  # whatever a step is, e^20 times it
            torch.testing.assert_close(found[layer, ways], metrics(model, task), rtol=1e-4, atol=1e-4)
            assert (found[layer, ways] - clean)[:, 0].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_zeros_in_attention_leave_a_pattern_of_mean_weights_of_the_position_itself(family, task):
    model = model_of(family)
    found = cuts(model, task, "zero")
    names = [f"attn.{layer}.pattern" for layer in range(2)]
    patterns = model.run(task.clean, capture=names).captured
    own = {
        name: torch.diag_embed(x.diagonal(dim1=2, dim2=3).mean((0, 2))[:, None].expand(-1, LENGTH))
        for name, x in patterns.items()
    }
    for layer in (None, 0, 1):
        edits = {
            name: (lambda x, name=name: own[name].expand_as(x)) for name in (names if layer is None else [names[layer]])
        }
        torch.testing.assert_close(found[layer, ("attn",)], metrics(model, task, edits=edits), rtol=1e-4, atol=1e-5)
        assert (found[layer, ("attn",)] - found[None, ()])[:, 0].abs().max() > 1e-3


@pytest.mark.parametrize("ablation", ["mean", "zero"])
@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1", "gpt2"])
def test_with_everything_cut_the_last_position_sees_only_itself(family, task, ablation):
    """So prompts that share their last token and what is asked of them are alike."""
    model = model_of(family)
    both = task._replace(
        clean=torch.cat([task.clean, task.corrupted["random"]]),
        answer=task.answer.repeat(2),
        distractor=task.distractor.repeat(2),
    )
    found = cuts(model, both, ablation, layers=[None])
    all_ways = choices(model)[-1]
    torch.testing.assert_close(found[None, all_ways][:6], found[None, all_ways][6:], rtol=1e-4, atol=1e-5)
    assert (found[None, ()][:6] - found[None, ()][6:])[:, 0].abs().max() > 1e-3


def test_means_are_those_of_clean_runs_whatever_the_batches(task):
    """Of the parts as the sites themselves tell them: taps, reads of the state before, rows of the pattern."""
    model = model_of("falcon_h1")
    means, again = (MixingCuts(model, task, size).means() for size in (6, 4))
    sites = ["mamba.1.conv_taps", "attn.1.pattern", "attn.1.v", "mamba.1.C"]
    run = model.run(task.clean, capture=[*sites, *(f"mamba.1.writes@{p}" for p in range(LENGTH))]).captured
    taps, pattern, v, C = (run[site] for site in sites)
    own = pattern.diagonal(dim1=2, dim2=3).mean((0, 2))[:, None, None] * torch.eye(LENGTH)
    read = [torch.einsum("bhpn,bn->bhp", run[f"mamba.1.writes@{p}"][:, :p].sum(1), C[:, p, 0]) for p in range(LENGTH)]
    expected = {
        "conv": taps[:, :, :-1].mean((0, 1)),
        "attn": torch.einsum("bhts,bshd->bthd", pattern - own, v).mean((0, 1)),
        "ssm": torch.stack(read, 1).mean((0, 1)),
    }
    assert means.keys() == {(layer, way) for layer in (0, 1) for way in expected}
    for way, value in expected.items():
        assert value.abs().max() > 1e-3
        torch.testing.assert_close(means[1, way], value, rtol=1e-4, atol=1e-6)
    for key, value in means.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-7)
    conv = {"mamba.1.conv_taps": lambda x: torch.cat([expected["conv"].expand_as(x[:, :, :-1]), x[:, :, -1:]], 2)}
    found = cuts(model, task, layers=[1])
    torch.testing.assert_close(found[1, ("conv",)], metrics(model, task, edits=conv), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
@pytest.mark.parametrize(
    ("plant", "needed"),
    [
        (lambda: planted_mamba(VOCAB, offset=0), {(0, "conv"), (2, "ssm")}),
        (lambda: planted_mamba2(VOCAB, offset=1), {(0, "conv"), (2, "conv"), (2, "ssm")}),
        (lambda: planted_mamba(VOCAB, offset=0, own_mover=False), {(2, "conv"), (2, "ssm")}),
        (lambda: planted_transformer(VOCAB, 16), {(0, "attn"), (2, "attn")}),
    ],
    ids=["mamba", "mamba2", "mamba, one layer", "transformer"],
)
def test_exactly_the_planted_ways_are_needed(plant, needed, ablation):
    task = make_task(6, 16, VOCAB, end_of_text=0, seed=0)
    top1 = METRICS.index("top1")
    for (layer, ways), values in cuts(plant().model, task, ablation).items():
        if layer is None:
            kept = not ways or not any((n, way) in needed for n in range(4) for way in ways)
        else:
            kept = not any((layer, way) in needed for way in ways)
        if kept:
            assert (values[:, 0] > 9.5).all(), (layer, ways)
            assert (values[:, top1] == 1).all()
        else:
            assert (values[:, 0].abs() < 3).all(), (layer, ways)


def test_what_cannot_be_cut_is_an_error(task):
    with pytest.raises(
        StudyError, match="rwkv: mixing of positions can be cut in state-space layers and attention only"
    ):
        cuts(tiny_model("rwkv"), task)
    with pytest.raises(StudyError, match="ablation 'half': allowed: mean, zero"):
        cuts(tiny_model("mamba"), task, "half")
    with pytest.raises(StudyError, match="layer 2: mamba has layers 0 to 1"):
        cuts(tiny_model("mamba"), task, layers=[2])
