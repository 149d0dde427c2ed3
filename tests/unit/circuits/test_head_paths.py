import pytest
import torch

from tests.conftest import LENGTH, tiny_model
from universality.circuits.component import Component
from universality.circuits.head_paths import HeadPaths
from universality.circuits.metrics import measure
from universality.circuits.path_patching import PatchingBatch, Place, with_shuffled_clean
from universality.circuits.tasks.induction import make_task
from universality.errors import StudyError

PLACES = [Place("B", 1), Place("last")]


@pytest.fixture
def task():
    return make_task(5, LENGTH, 50, end_of_text=0, seed=0)


def attention_model(name: str, n_layers: int = 3, n_heads: int = 2):
    """Of weights so large that effects are, too."""
    changes = {"n_heads": 4, "n_kv_heads": 2} if name == "llama" else {"n_heads": n_heads}
    model = tiny_model(name.removesuffix("_sequential"), n_layers=n_layers, **changes)
    for block in model.blocks:
        if name == "gpt_neox_sequential":
            block.use_parallel_residual = False
        for parameter in block.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1).add_(0.1 * torch.randn_like(parameter))
    model.hf.get_output_embeddings().weight.mul_(10)
    return model


@pytest.fixture(params=["gpt_neox", "gpt_neox_sequential", "gpt2", "llama"])
def batch(request, task):
    return HeadPaths(attention_model(request.param), task, "replace_B")


def by_path(effects):
    return {effect._replace(values=None): effect.values for effect in effects}


def assert_same(fast, plain, size):
    fast, plain = by_path(fast), by_path(plain)
    assert fast.keys() == plain.keys()
    for path, values in plain.items():
        torch.testing.assert_close(fast[path], values, rtol=1e-4, atol=1e-5, msg=lambda m, path=path: f"{path}: {m}")
    assert max(values[:, 0].abs().mean() for values in plain.values()) > size


@pytest.mark.parametrize("positions", [None, PLACES], ids=["everywhere", "by position"])
def test_fast_paths_to_the_logits_are_those_of_whole_runs(batch, positions):
    for method, size in ((batch.to_logits, 0.05), (batch.mlp_to_logits, 0.02)):
        assert_same(method(positions=positions), method(positions=positions, fast=False), size)


def test_fast_paths_through_receivers_are_those_of_whole_runs(batch):
    receivers = [Component(f"attn.{layer}.z", head) for layer, head in ((2, 1), (1, 0), (0, 0))]
    effects = list(batch.to_receivers(receivers))
    assert_same(effects, batch.to_receivers(receivers, fast=False), 0.005)
    assert {effect.input for effect in effects} == {None, "q", "k", "v"}
    assert {effect.receiver for effect in effects} == set(receivers[:2])  # nothing is sent to the first layer
    some = [effect for effect in effects if effect.receiver == receivers[1] and effect.input in (None, "k")]
    assert_same(batch.to_receiver(receivers[1], ["k"]), some, 0)


def test_a_clean_value_in_place_of_itself_changes_nothing(batch):
    batch.corrupted = batch.clean
    receiver = Component("attn.2.z", 1)
    for effects in (batch.to_logits(), batch.mlp_to_logits(positions=PLACES), batch.to_receiver(receiver)):
        for effect in effects:
            assert effect.values.abs().max() < 1e-4, effect


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_neox_sequential", "gpt2"])
def test_the_only_head_of_a_model_makes_the_corrupted_run(name, task):
    """The last token is the same in both, so all that comes to the last position comes through it."""
    model = attention_model(name, n_layers=1, n_heads=1)
    batch = HeadPaths(model, task, "replace_B")
    expected = measure(model.run(task.corrupted["replace_B"]).logits[:, -1], task) - batch.clean_metrics
    assert expected[:, 0].abs().mean() > 0.05
    effects = by_path([*batch.to_logits(), *batch.to_logits(positions=PLACES)])
    assert len(effects) == 6
    for effect, values in effects.items():
        elsewhere = effect.position == "B+1"
        torch.testing.assert_close(values, 0 * expected if elsewhere else expected, rtol=1e-4, atol=1e-5)


def only_mixer(site: str):
    """A model in which nothing but this site moves anything between positions."""
    model = tiny_model("rwkv" if site.startswith("rwkv") else "falcon_h1")
    for layer, block in enumerate(model.blocks):
        if site.startswith("rwkv"):
            silent = [block.feed_forward.value, *([block.attention.output] if layer else [])]
        else:
            block.mamba.A_log.fill_(-4)  # let the state last
            attention, mamba = block.self_attn.o_proj, block.mamba.out_proj
            silent = [attention, mamba] if layer else [mamba if site.startswith("attn") else attention]
        for linear in silent:
            linear.weight.zero_()
    return model


@pytest.mark.parametrize("site", ["rwkv.0.out", "attn.0.out", "mamba.0.out"])
def test_the_only_mixer_of_a_model_makes_the_corrupted_run(site, task):
    model = only_mixer(site)
    batch = PatchingBatch(model, task, "replace_B")
    expected = measure(model.run(task.corrupted["replace_B"]).logits[:, -1], task) - batch.clean_metrics
    assert expected[:, 0].abs().mean() > 1e-4
    effects = by_path([*batch.outputs_to_logits(), *batch.outputs_to_logits(positions=PLACES)])
    total = {e.position: values for e, values in effects.items() if e.sender.site == site and e.path == "total"}
    torch.testing.assert_close(total[None], expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(total["last"], expected, rtol=1e-3, atol=1e-5)
    assert total["B+1"].abs().max() < 1e-5


def test_the_null_puts_in_what_another_clean_prompt_has(task):
    shuffled = with_shuffled_clean(task, seed=3)
    order = [(task.clean == row).all(1).nonzero().item() for row in shuffled.corrupted["shuffled_clean"]]
    assert sorted(order) == list(range(5))
    assert all(prompt != own for own, prompt in enumerate(order))
    assert torch.equal(with_shuffled_clean(task, 3).corrupted["shuffled_clean"], shuffled.corrupted["shuffled_clean"])
    model = attention_model("gpt2")
    z = model.run(task.clean, capture=["attn.0.z"]).captured["attn.0.z"]

    def edit(current):
        return torch.cat([z[order][:, :, :1], current[:, :, 1:]], dim=2)

    expected = measure(model.run(task.clean, edits={"attn.0.z": edit}).logits[:, -1], task)
    parts = []
    for part in shuffled.batches(3):
        batch = HeadPaths(model, part, "replace_B", donor="shuffled_clean")
        parts.append(next(batch.to_logits()).values + batch.clean_metrics)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-5)


def test_the_unembedding_of_the_last_stream_is_the_logits(family, task):
    model = tiny_model(family)
    if family == "falcon_h1":
        model.hf.config.lm_head_multiplier = model.hf.model.lm_head_multiplier = 0.3
    logits, captured = model.run(task.clean, capture=["resid_post.1"])
    torch.testing.assert_close(model.unembed(captured["resid_post.1"]), logits)


def test_bad_requests_are_one_line(task):
    batch = HeadPaths(attention_model("gpt2"), task, "replace_B")
    with pytest.raises(StudyError, match=r"place 'C\+1': task induction has last, A, B"):
        list(batch.to_logits(positions=[Place("C", 1)]))
    with pytest.raises(StudyError, match=r"place 'last\+1': is position 16 in a sequence of 16 tokens"):
        list(batch.mlp_to_logits(positions=[Place("last", 1)]))
    with pytest.raises(StudyError, match="input 'z' of L1H0: it has q, k, v"):
        list(batch.to_receiver(Component("attn.1.z", 0), ["z"]))
    with pytest.raises(StudyError, match="corruption 'replace_C': task induction has replace_B, replace_A"):
        HeadPaths(batch.model, task, "replace_C")
    with pytest.raises(StudyError, match="1 prompt; a shuffle of clean prompts needs at least 2"):
        with_shuffled_clean(task.part(slice(1)), 0)
    with pytest.raises(StudyError, match="mamba has no MLPs to patch"):
        list(HeadPaths(tiny_model("mamba"), task, "replace_B").mlp_to_logits())
