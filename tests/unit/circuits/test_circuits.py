import pytest
import torch

from tests.conftest import LENGTH, tiny_model
from universality.circuits.component import Component
from universality.circuits.metrics import measure
from universality.circuits.off_by_one import OFFSETS, profile
from universality.circuits.path_patching import PatchingBatch, mixing_sites
from universality.circuits.tasks.induction import make_task
from universality.errors import StudyError


@pytest.fixture
def task():
    return make_task(6, LENGTH, 50, end_of_text=0, seed=0)


def test_the_task_is_what_it_says(task):
    rows = torch.arange(6)
    position_A, position_B = task.positions["A"], task.positions["B"]
    assert (task.clean[:, 0] == 0).all()
    assert torch.equal(task.clean[rows, position_A], task.clean[:, -1])
    assert torch.equal(task.clean[rows, position_B], task.answer)
    for row in task.clean:
        assert len(set(row.tolist())) == LENGTH - 1  # A twice, all else once
    for name, where in (("replace_B", position_B), ("replace_A", position_A)):
        changed = task.corrupted[name] != task.clean
        assert torch.equal(changed.nonzero()[:, 1], where)
        assert changed.sum() == 6
    assert torch.equal(task.corrupted["replace_B"][rows, position_B], task.distractor)
    with pytest.raises(StudyError, match="needs 17 distinct tokens, the vocabulary has 15"):
        make_task(2, 16, 16, 0, 0)


def test_metrics_are_their_definitions(task):
    logits = torch.randn(6, 50)
    logits[0, task.answer[0]] = 9
    values = measure(logits, task)
    for s in range(6):
        last = logits[s]
        right, wrong = last[task.answer[s]], last[task.distractor[s]]
        p = torch.softmax(last, 0)[task.answer[s]]
        expected = [right - wrong, torch.log(p), p, right, torch.tensor(float(right == last.max()))]
        torch.testing.assert_close(values[s], torch.stack(expected))
    assert values[0, 4] == 1


def test_patching_a_sender_with_its_own_clean_value_changes_nothing(family, task):
    batch = PatchingBatch(tiny_model(family), task, "replace_B")
    batch.corrupted = batch.clean
    effects = [*batch.to_logits(), *batch.to_receiver(last_receiver(batch.model))]
    assert len(effects) > 4
    for effect in effects:
        assert effect.values.abs().max() < 1e-4, effect[:3]


def last_receiver(model) -> Component:
    if "attn.1.z" in model.sites:
        return Component("attn.1.z", 1)
    return Component("rwkv.1.out") if "rwkv.1.out" in model.sites else Component("mamba.1.conv_in")


def test_in_the_last_layer_direct_and_total_paths_are_one(family, task):
    effects = list(PatchingBatch(tiny_model(family), task, "replace_B").to_logits())
    last = {e.sender for e in effects if e.sender.layer == 1}
    if family == "rwkv":  # its channel mix looks one token back, so it mixes positions after the time mix has
        last = {sender for sender in last if sender.site.startswith("mlp")}
    for sender in last:
        direct, total = (
            next(e.values for e in effects if e.sender == sender and e.path == p) for p in ("direct", "total")
        )
        torch.testing.assert_close(direct, total, rtol=1e-4, atol=1e-4)
        assert direct.abs().max() > 1e-5


def test_all_mixers_corrupted_at_once_are_the_corrupted_run(family, task):
    """One position reaches another only through the frozen sites, so they decide on the last logits."""
    model = tiny_model(family)
    sites = mixing_sites(model)
    corrupted = model.run(task.corrupted["replace_B"], capture=sites)
    edits = {site: (lambda value, site=site: corrupted.captured[site]) for site in sites}
    patched = model.run(task.clean, edits=edits)
    torch.testing.assert_close(patched.logits[:, -1], corrupted.logits[:, -1], rtol=1e-4, atol=1e-4)


def planted_attention_model():
    """A GPT-NeoX in which only head L1H0 moves anything between positions."""
    model = tiny_model("gpt_neox")
    d_head = 8
    for layer, block in enumerate(model.hf.gpt_neox.layers):
        weight = block.attention.dense.weight
        weight[:, d_head:] = 0
        if layer == 0:
            weight[:] = 0
    return model, "L1H0"


def planted_mamba_model():
    """A Mamba in which only layer 1's state moves anything between positions: convolutions see one token."""
    model = tiny_model("mamba")
    for layer, block in enumerate(model.hf.backbone.layers):
        block.mixer.conv1d.weight[..., :-1] = 0
        block.mixer.out_proj.weight.mul_(0 if layer == 0 else 30)
    return model, "L1 state"


@pytest.mark.parametrize("plant", [planted_attention_model, planted_mamba_model])
def test_a_planted_circuit_is_found(plant, task):
    model, planted = plant()
    effects = {
        e.sender.name: e.values for e in PatchingBatch(model, task, "replace_B").to_logits() if e.path == "direct"
    }
    assert effects[planted].abs().mean() > 3e-4
    for name, values in effects.items():
        if not name.startswith("L1") or (name.startswith("L1H") and name != planted):
            assert values.abs().max() < 1e-5, name


def test_the_profile_of_convolutions_that_see_one_token_is_at_offset_zero(task):
    """With convolutions cut to their own token, B can only be written at its own position."""
    model, _ = planted_mamba_model()
    effects = {(sender.layer, offset): values for sender, offset, values in profile(model, task, "replace_B")}
    assert effects[1, 0].abs().mean() > 3e-4
    for offset in OFFSETS:
        if offset != 0:
            assert effects[1, offset].abs().max() < 1e-5


def test_the_profile_of_convolutions_that_see_the_token_before_is_off_by_one(task):
    model, _ = planted_mamba_model()
    for block in model.hf.backbone.layers:
        weight = block.mixer.conv1d.weight
        weight[..., -2], weight[..., -1] = weight[..., -1].clone(), 0
    effects = {(sender.layer, offset): values for sender, offset, values in profile(model, task, "replace_B")}
    assert effects[1, 1].abs().mean() > 3e-4
    for offset in OFFSETS:
        if offset != 1:
            assert effects[1, offset].abs().max() < 1e-5
