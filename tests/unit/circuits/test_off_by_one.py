"""Which position writes B for the last one, in states and in attention; and what a profile comes to."""

import numpy as np
import pytest
import torch

from tests.conftest import LENGTH, tiny_model
from universality.circuits.attention_writes import AttentionWrites
from universality.circuits.columns import METRICS
from universality.circuits.component import Component
from universality.circuits.faithfulness import draws
from universality.circuits.metrics import measure
from universality.circuits.off_by_one import (
    OFFSETS,
    Profile,
    kept_offsets,
    layer_shares,
    profile,
    strongest,
    whole_profile,
)
from universality.circuits.planted import planted_mamba, planted_mamba2, planted_transformer
from universality.circuits.tasks.induction import make_task
from universality.errors import StudyError

VOCAB = 24


@pytest.fixture(scope="module")
def task():
    return make_task(6, LENGTH, 50, end_of_text=0, seed=0)


def attention_model(family: str):
    """Three layers of weights so large that effects are, too; llama's heads share keys and values in pairs."""
    model = tiny_model(family, n_layers=3, n_heads=4, **({"n_kv_heads": 2} if family == "llama" else {}))
    for block in model.blocks:
        for name, parameter in block.named_parameters():
            if family != "falcon_h1" and parameter.ndim == 2 and "mlp" not in name:
                parameter.mul_(3)
    model.hf.get_output_embeddings().weight.mul_(10)
    return model


def by_whole_runs(model, task, corruption, layer, offset):
    """k and v edited for all queries in one run, of which only the last position's z is taken over by another."""
    rows, at = torch.arange(len(task.clean)), task.positions["B"] + offset
    names = [f"attn.{layer}.{site}" for site in "kvz"]
    donor = model.run(task.corrupted[corruption], capture=names).captured

    def put(site):
        def edit(value):
            value = value.clone()
            value[rows, at] = donor[site][rows, at]
            return value

        return edit

    z = model.run(task.clean, capture=names, edits={site: put(site) for site in names[:2]}).captured[names[2]]

    def last(value):
        return torch.cat([value[:, :-1], z[:, -1:]], 1)

    patched, clean = (model.run(task.clean, edits=edits).logits[:, -1] for edits in ({names[2]: last}, {}))
    return measure(patched, task) - measure(clean, task)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama", "falcon_h1"])
def test_keys_and_values_for_the_last_query_are_those_of_whole_runs(family, task):
    model, offsets = attention_model(family), (0, 1, 3)
    batch = AttentionWrites(model, task, "no_repeat")
    fast, plain = ({(e.sender, e.offset): e.values for e in batch.writes(offsets, fast=f)} for f in (True, False))
    assert fast.keys() == {(Component(f"attn.{layer}.kv"), offset) for layer in range(3) for offset in offsets}
    for (sender, offset), values in fast.items():
        expected = by_whole_runs(model, task, "no_repeat", sender.layer, offset)
        torch.testing.assert_close(plain[sender, offset], expected, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=2e-5)
    for layer in range(3):
        assert max(fast[Component(f"attn.{layer}.kv"), d][:, 0].abs().mean() for d in offsets) > 1e-3


def test_attention_that_is_not_the_plain_softmax_is_refused(task):
    model = tiny_model("gpt2")
    module = model.blocks[1].attn
    batch = AttentionWrites(model, task, "replace_B")
    for layer in range(2):
        torch.testing.assert_close(batch._last_z(layer), batch.clean[f"attn.{layer}.z"][:, -1], rtol=1e-5, atol=1e-5)
    module.forward = lambda *args, forward=module.forward, **keywords: _scaled(module, forward, args, keywords)
    with pytest.raises(StudyError, match="attn.1.z: is not what q, k and v give by softmax; gpt2 differs"):
        AttentionWrites(model, task, "replace_B")


def _scaled(module, forward, args, keywords):
    """Attention whose scale is another one while it runs than the module tells afterwards."""
    scale, module.scaling = module.scaling, 3 * module.scaling
    try:
        return forward(*args, **keywords)
    finally:
        module.scaling = scale


STATE_SPACE = [(plant, *how) for plant in (planted_mamba, planted_mamba2) for how in ((0, 1), (1, 1), (3, 1), (2, 0))]
PLANTS = [
    *((lambda p=p, d=d, own=own: p(VOCAB, offset=d, own_mover=bool(own)), d, "replace_B") for p, d, own in STATE_SPACE),
    *((lambda: planted_transformer(VOCAB, 16), 0, corruption) for corruption in ("replace_B", "replace_A")),
]


@pytest.mark.parametrize(("plant", "offset", "corruption"), PLANTS)
def test_the_share_is_all_at_the_planted_offset(plant, offset, corruption):
    task, planted = make_task(8, 16, VOCAB, end_of_text=0, seed=0), plant()
    found = whole_profile(planted.model, task, corruption, batch_size=3)
    layers = layer_shares(found, draws(8, 50, seed=1), 0.9)
    model = strongest(layers)
    assert model.sender.layer == planted.inducer.layer
    assert float(model.total.value) == pytest.approx(-20 if corruption == "replace_B" else -10, rel=1e-3)
    expected = np.array([float(d == offset) for d in OFFSETS])
    for part in model.shares:
        np.testing.assert_allclose(part, expected, atol=1e-4)
    for part in range(3):
        assert float(model.off_by_one[part]) == pytest.approx(float(offset == 1), abs=1e-4)
        assert float(model.mean_offset[part]) == pytest.approx(offset, abs=1e-3)
    for layer, effects in zip(layers, found.effects[..., 0], strict=True):
        if layer is not model:
            assert np.abs(effects).max() < 2e-4
            assert layer.shares is layer.off_by_one is layer.mean_offset is None


def test_a_hybrid_has_both_kinds_apart(task):
    model = tiny_model("falcon_h1")
    found = whole_profile(model, task, "replace_B", (0, 1))
    assert [sender.name for sender in found.senders] == ["L0 writes", "L1 writes", "L0 kv", "L1 kv"]
    assert found.effects.shape == (4, 2, 6, len(METRICS))
    for kind, rows in (("mamba", slice(0, 2)), ("attn", slice(2, 4))):
        assert np.array_equal(found.of_kind(kind).effects, found.effects[rows])
        alone = list(profile(model, task, "replace_B", (0, 1), kinds=[kind]))
        assert tuple(dict.fromkeys(sender for sender, _, _ in alone)) == found.of_kind(kind).senders
        measured = np.stack([values.double().numpy() for _, _, values in alone]).reshape(2, 2, 6, -1)
        np.testing.assert_allclose(measured, found.of_kind(kind).effects, atol=1e-6)


@pytest.mark.parametrize("family", ["mamba", "llama"])
def test_prompts_can_be_measured_in_batches(family, task):
    model = tiny_model(family)
    whole, parts = (whole_profile(model, task, "replace_B", batch_size=size).effects for size in (6, 4))
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_offsets_that_a_prompt_does_not_have_are_left_out_for_all(caplog):
    near = make_task(3, 16, VOCAB, end_of_text=0, seed=0, distance=2)  # B stands at 13, the last A at 15
    with caplog.at_level("INFO"):
        assert kept_offsets(near) == (-1, 0, 1)
    assert "offsets [-1, 0, 1] from B are kept of [-1, 0, 1, 2, 3, 4]" in caplog.text
    assert kept_offsets(near, (-14, -13)) == (-13,)
    planted = planted_mamba(VOCAB, offset=0)
    assert whole_profile(planted.model, near, "replace_B").offsets == (-1, 0, 1)
    without_one = whole_profile(planted.model, near, "replace_B", (0, 2))
    model = strongest(layer_shares(without_one, draws(3, 20, seed=0), 0.9))
    assert without_one.offsets == (0,)
    assert model.off_by_one is None
    assert float(model.mean_offset.value) == 0
    with pytest.raises(StudyError, match=r"offsets \[2, 3\] from B: none is before the last position in every prompt"):
        kept_offsets(near, (2, 3))
    with pytest.raises(StudyError, match="offset 2 from B: is not before the last position in every prompt"):
        list(profile(planted.model, near, "replace_B", (0, 2)))


def test_what_cannot_be_measured_is_an_error(task):
    with pytest.raises(StudyError, match="rwkv: the off-by-one profile needs state-space layers or attention"):
        list(profile(tiny_model("rwkv"), task, "replace_B"))
    with pytest.raises(StudyError, match="rwkv: has no attention to patch"):
        AttentionWrites(tiny_model("rwkv"), task, "replace_B")
    gpt2 = tiny_model("gpt2")
    with pytest.raises(StudyError, match="kind 'mamba': gpt2 has attn"):
        list(profile(gpt2, task, "replace_B", kinds=["mamba"]))
    with pytest.raises(StudyError, match="corruption 'ABC': task induction has replace_B"):
        list(profile(gpt2, task, "ABC"))
    with pytest.raises(StudyError, match="place 'S2': the task induction has A, B"):
        list(profile(gpt2, task, "replace_B", place="S2"))


def test_shares_are_ratios_of_means_and_noise_has_none():
    rng = np.random.default_rng(0)
    S = 40
    size = rng.uniform(1, 3, S)
    effects = np.zeros((4, 3, S, len(METRICS)))
    effects[0, :, :, 0] = np.outer([-0.5, -2, 0.5], size)  # opposite signs: shares leave [0, 1]
    effects[1, :, :, 0] = rng.normal(np.array([[-1.0], [-4.0], [0.0]]), 1, (3, S))
    noise = rng.normal(0, 5, (3, S))
    effects[2, :, :, 0] = noise - noise.mean() + 0.01
    effects[3, :, :, 0] = 1e-6  # surely not 0, and no more than rounding
    found = Profile(tuple(Component(f"attn.{n}.kv") for n in range(4)), (0, 1, 2), effects)
    drawn = draws(S, 400, seed=3)
    constant, spread, noisy, rounding = layer_shares(found, drawn, 0.95)
    for part in constant.shares:  # the same in every prompt, so in every sample
        np.testing.assert_allclose(part, [0.25, 1, -0.25])
    means = effects[1, :, :, 0].mean(1)
    np.testing.assert_allclose(spread.shares.value, means / means.sum())
    assert float(spread.off_by_one.value) == pytest.approx(means[1] / means.sum())
    assert float(spread.mean_offset.value) == pytest.approx((means[1] + 2 * means[2]) / means.sum())
    assert spread.off_by_one.low < spread.off_by_one.value < spread.off_by_one.high
    by_hand = [effects[1, :, sample, 0].mean(0) for sample in drawn]
    expected = np.quantile([m[1] / m.sum() for m in by_hand], [0.025, 0.975])
    np.testing.assert_allclose([spread.off_by_one.low, spread.off_by_one.high], expected)
    for layer in (noisy, rounding):
        assert layer.shares is layer.off_by_one is layer.mean_offset is None
    assert noisy.total.low < 0 < noisy.total.high
    assert strongest([noisy, rounding, constant, spread]) is spread
