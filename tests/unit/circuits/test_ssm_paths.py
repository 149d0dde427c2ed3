"""Path patching within state-space layers: the quick form against whole runs, and both against what must be true."""

import pytest
import torch

from tests.conftest import LENGTH, tiny_model
from universality.circuits.component import Component
from universality.circuits.metrics import measure
from universality.circuits.ssm_fast import SsmPatching, ssm_patching
from universality.circuits.ssm_paths import ANYWHERE, AT_LAST, PlainSsmPatching
from universality.circuits.tasks.induction import make_task
from universality.errors import StudyError

CLOSE = {"rtol": 1e-4, "atol": 5e-6}
K = 4
OFFSETS = (-1, 0, 1, 4)


@pytest.fixture(params=["mamba", "mamba2"])
def family(request):
    return request.param


@pytest.fixture
def task():
    return make_task(3, LENGTH, 50, end_of_text=0, seed=0)


CALLS = {
    "to logits": lambda paths: paths.to_logits(),
    "state": lambda paths: paths.state_to_logits(["total"]),
    "one position": lambda paths: paths.to_logits(ANYWHERE, where=1),
    "last position": lambda paths: paths.to_logits(ANYWHERE, where="last"),
    "taps, u": lambda paths: paths.conv_taps(OFFSETS),
    "taps, all": lambda paths: paths.conv_taps(OFFSETS, through="all"),
    "writes": lambda paths: paths.writes(OFFSETS),
    "channels": lambda paths: paths.write_channels(1, 0),
}


def elsewhere(task):
    """The task with a corruption "other": sequences that differ everywhere, so that every value of every layer does."""
    other = torch.randint(0, 50, task.clean.shape, generator=torch.Generator().manual_seed(1))
    return task._replace(corrupted={"other": other})


def both_forms(family, task, n_layers=3):
    model, task = tiny_model(family, n_layers=n_layers), elsewhere(task)
    return PlainSsmPatching(model, task, "other"), SsmPatching(model, task, "other")


@pytest.mark.parametrize("call", CALLS)
def test_the_quick_form_is_the_plain_one(family, task, call):
    plain, quick = (list(CALLS[call](paths)) for paths in both_forms(family, task))
    assert [e._replace(values=None) for e in plain] == [e._replace(values=None) for e in quick]
    seen = {e[:3]: 0.0 for e in plain}
    for ours, theirs in zip(quick, plain, strict=True):
        torch.testing.assert_close(ours.values, theirs.values, **CLOSE, msg=lambda m, e=theirs: f"{e}: {m}")
        seen[theirs[:3]] = max(seen[theirs[:3]], float(theirs.values.abs().max()))
    if call == "one position":  # C is read at its own position alone
        seen = {path: size for path, size in seen.items() if not path[0].site.endswith(".C")}
    assert min(seen.values()) > 3e-4, seen  # every kind of every layer moves something


def test_steps_that_let_nothing_through_are_exchanged_too(task):
    model = tiny_model("mamba")
    for block in model.blocks:
        block.mixer.x_proj.weight[: block.mixer.time_step_rank] *= 30
        block.mixer.A_log += 4  # what one step leaves of a state is no float32 for some channels, all for others
    task = elsewhere(task)
    plain, quick = (kind(model, task, "other") for kind in (PlainSsmPatching, SsmPatching))
    values = model.run(task.clean, capture=["mamba.1.delta"]).captured["mamba.1.delta"]
    assert (values.max() - values.min()) * 4 * torch.e**4 > 90
    for ours, theirs in zip(*(paths.conv_taps([0, 3], "all") for paths in (quick, plain)), strict=True):
        torch.testing.assert_close(ours.values, theirs.values, **CLOSE)


def test_many_rows_at_once_are_the_same_rows(family, task, monkeypatch):
    _, whole = both_forms(family, task)
    expected = [*whole.writes(OFFSETS), *whole.write_channels(0, 1)]
    monkeypatch.setattr("universality.circuits.ssm_fast._ROWS", 7)
    monkeypatch.setattr("universality.circuits.ssm_fast._LOGIT_ROWS", 4)
    for ours, theirs in zip([*whole.writes(OFFSETS), *whole.write_channels(0, 1)], expected, strict=True):
        assert ours[:3] == theirs[:3]
        torch.testing.assert_close(ours.values, theirs.values, **CLOSE)


@pytest.mark.parametrize("kind", [PlainSsmPatching, SsmPatching])
def test_clean_onto_clean_changes_nothing(family, task, kind):
    paths = kind(tiny_model(family), task._replace(corrupted={"none": task.clean}), "none")
    for call in CALLS.values():
        for effect in call(paths):
            assert effect.values.abs().max() < 1e-5, effect


def test_writes_of_all_positions_are_the_state(family, task):
    """Where steps do not depend on the input, corrupted and clean states decay alike and writes alone differ."""
    model = tiny_model(family)
    for block in model.blocks:
        if family == "mamba":
            block.mixer.dt_proj.weight.zero_()
        else:
            block.mixer.in_proj.weight[-block.mixer.num_heads :] = 0
    start = task._replace(positions={"start": torch.zeros(3, dtype=torch.long)})
    paths = SsmPatching(model, start, "replace_B", "start")
    for layer in range(2):
        total = paths.change_of_writes(layer, range(LENGTH)).sum(0)
        expected = (paths.corrupted.state(layer) - paths.clean.state(layer))[0]
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [PlainSsmPatching, SsmPatching])
def test_taps_are_exchanged_one_at_a_time(family, task, kind):
    """The input of layer 0 differs at B alone, so at offset d only tap K - 1 - d has anything to exchange."""
    paths = kind(tiny_model(family), task, "replace_B")
    effects = [e for e in paths.conv_taps(range(-1, K + 1)) if e.sender.layer == 0]
    assert len(effects) == (K + 2) * K
    for effect in effects:
        largest = float(effect.values.abs().max())
        assert largest > 1e-5 if effect.tap == K - 1 - effect.offset else largest < 1e-6, effect
    again = [e for e in paths.conv_taps([2]) if e.sender.layer == 0]
    for effect in again:
        same = next(e for e in effects if e[4:] == effect[4:])
        torch.testing.assert_close(effect.values, same.values, rtol=1e-5, atol=1e-6)


def test_in_the_last_layer_direct_and_total_are_one(family, task):
    for paths in both_forms(family, task, n_layers=2):
        effects = [e for e in paths.to_logits() if e.sender.layer == 1]
        for direct, total in zip(effects[::2], effects[1::2], strict=True):
            assert (direct.path, total.path) == ("direct", "total")
            torch.testing.assert_close(direct.values, total.values, **CLOSE)


def test_a_hybrid_has_the_plain_form(task):
    model, task = tiny_model("falcon_h1"), elsewhere(task)
    paths = ssm_patching(model, task, "other")
    effects = {(e.sender, e.path): e.values for e in paths.to_logits((*AT_LAST, "delta"))}
    for kind in (*AT_LAST, "delta"):
        last = Component(f"mamba.1.{kind}")
        assert effects[last, "total"].abs().max() > 1e-5
        torch.testing.assert_close(effects[last, "direct"], effects[last, "total"], **CLOSE)
    state = model.run(task.corrupted["other"], capture=["mamba.0.state@-1"]).captured["mamba.0.state@-1"]
    patched = model.run(task.clean, edits={"mamba.0.state@-1": lambda value: state}).logits[:, -1]
    expected = measure(patched, task) - measure(model.run(task.clean).logits[:, -1], task)
    torch.testing.assert_close(effects[Component("mamba.0.state@-1"), "total"], expected, **CLOSE)


def test_bad_input_is_one_line(task):
    model = tiny_model("mamba")
    with pytest.raises(StudyError, match="gpt_neox: has no state-space layers to patch"):
        ssm_patching(tiny_model("gpt_neox"), task, "replace_B")
    with pytest.raises(StudyError, match="corruption 'none': the task induction has replace_B, replace_A"):
        ssm_patching(model, task, "none")
    with pytest.raises(StudyError, match="place 'Z': the task induction has A, B"):
        ssm_patching(model, task, "replace_B", "Z")
    with pytest.raises(StudyError, match="falcon_h1: has no single steps"):
        SsmPatching(tiny_model("falcon_h1"), task, "replace_B")
    paths = ssm_patching(model, task, "replace_B")
    with pytest.raises(StudyError, match="sender 'conv': no such sender; allowed: state@-1, y"):
        list(paths.to_logits(["conv"]))
    with pytest.raises(StudyError, match="through 'B': no such through; allowed: u, all"):
        list(paths.conv_taps([0], "B"))
    with pytest.raises(StudyError, match="path 'all': no such path; allowed: direct, total"):
        list(paths.state_to_logits(["all"]))
    with pytest.raises(StudyError, match=r"offset 14 from B: \d+ is no position of 16 tokens"):
        list(paths.writes([14]))
