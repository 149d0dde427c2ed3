import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tests.conftest import LENGTH, tiny_model
from universality.circuits.attribution import WRITERS, Attribution, components, node_attribution
from universality.circuits.columns import METRICS
from universality.circuits.component import LOGITS, Component
from universality.circuits.edges import EdgePatching, edge_attribution, graph_of
from universality.circuits.faithfulness import (
    Curve,
    agreement,
    area,
    completeness,
    draws,
    edge_curve,
    faithfulness,
    node_curve,
    patched_effects,
)
from universality.circuits.metrics import measure
from universality.circuits.path_patching import PatchingBatch
from universality.circuits.tasks.induction import make_task
from universality.errors import StudyError

FOUR = pytest.mark.parametrize("family", ["gpt_neox", "mamba", "rwkv", "falcon_h1"])


@pytest.fixture
def task():
    return make_task(4, LENGTH, 50, end_of_text=0, seed=0)


@pytest.fixture
def pair():
    """Two prompts whose answers and distractors are four tokens, none of them in the other prompt."""
    task = make_task(2, LENGTH, 50, end_of_text=0, seed=0)
    for s in (0, 1):
        assert not {int(task.answer[s]), int(task.distractor[s])} & set(task.clean[1 - s].tolist())
    return task


def model_of(family):
    """RWKV's own embeddings are so small that its first norm, which stands before the stream, is linear in them."""
    model = tiny_model(family)
    if family == "rwkv":
        model.hf.get_input_embeddings().weight.mul_(1e4)
    return model


def near(model, task, share):
    """Have each distractor's embedding go only `share` of the way from the answer's: a small corruption."""
    weight = model.hf.get_input_embeddings().weight
    weight[task.distractor] = torch.lerp(weight[task.answer], weight[task.distractor], share)
    return model


def silence(model, layer):
    """Let nothing in this layer write to the stream, but MLPs that see one position alone."""
    for name, parameter in model.blocks[layer].named_parameters():
        if name.endswith(
            ("dense.weight", "o_proj.weight", "out_proj.weight", "attention.output.weight", "feed_forward.value.weight")
        ):
            parameter.zero_()


def gap(model, task, metric="logit_diff"):
    """m(corrupted) - m(clean) of each prompt."""
    clean, corrupted = (model.run(p).logits[:, -1] for p in (task.clean, task.corrupted["replace_B"]))
    return (measure(corrupted, task) - measure(clean, task))[:, METRICS.index(metric)]


@FOUR
def test_a_small_change_has_the_effect_that_the_scores_say(family, pair):
    """Of every component, and of every third edge, against patched runs."""
    model = near(model_of(family), pair, 0.01)
    found = node_attribution(model, pair, "replace_B", "log_prob")
    effects = patched_effects(model, pair, "replace_B", found.components, "log_prob")
    assert effects.abs().max() > 1e-4
    torch.testing.assert_close(found.total, effects, rtol=0.05, atol=0.01 * effects.abs().max().item())

    graph, scores = edge_attribution(model, pair, "replace_B", "log_prob")
    patching = EdgePatching(model, graph, pair, "replace_B")
    clean = measure(model.run(pair.clean).logits[:, -1], pair)[:, 1]
    scale = scores.abs().max().item()
    for u, r in graph.exists.nonzero()[::3].tolist():
        keep = graph.exists
        keep[u, r] = False
        effect = measure(patching.logits(keep), pair)[:, 1] - clean
        torch.testing.assert_close(scores[:, u, r], effect, rtol=0.05, atol=0.02 * scale)


def test_in_double_precision_scores_are_derivatives(pair):
    model = tiny_model("gpt_neox")
    model.hf.double()
    model = near(model, pair, 1e-6)
    found = node_attribution(model, pair, "replace_B", "log_prob")
    effects = patched_effects(model, pair, "replace_B", found.components, "log_prob")
    assert effects.abs().max() > 1e-9
    torch.testing.assert_close(found.total, effects, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("family", "kinds"), [("gpt_neox", ("z", "mlp")), ("mamba", ("state", "y", "gate", "out"))])
def test_what_acts_linearly_is_scored_exactly(family, kinds, task):
    """Without the final norm the last layer's values act linearly on the logits, each on its own."""
    model = tiny_model(family)
    stack, name = (model.hf.gpt_neox, "final_layer_norm") if family == "gpt_neox" else (model.hf.backbone, "norm_f")
    getattr(stack, name).forward = lambda x: x
    linear = [c for c in components(model) if c.layer == 1 and any(f".{k}" in c.site or k in c.name for k in kinds)]
    scores = node_attribution(model, task, "replace_B").of(linear).total
    effects = patched_effects(model, task, "replace_B", linear)
    assert effects.abs().amax(0).min() > 1e-5 or family == "gpt_neox"  # its last MLP sees nothing of B
    torch.testing.assert_close(scores, effects, rtol=1e-3, atol=1e-5 * max(1, effects.abs().max().item()))


@FOUR
def test_a_writers_edges_sum_to_its_score(family, task):
    graph, scores = edge_attribution(model_of(family), task, "replace_B", steps=2)
    nodes = node_attribution(model_of(family), task, "replace_B", steps=2).of(graph.writers).total
    first = 1 if family == "rwkv" else 0
    torch.testing.assert_close(
        scores.sum(2)[:, first:], nodes[:, first:], rtol=1e-3, atol=1e-5 * nodes.abs().max().item()
    )
    assert (scores[:, ~graph.exists] == 0).all()


@FOUR
def test_the_embeddings_integrated_score_tends_to_the_whole_effect(family, task):
    model = tiny_model(family)
    whole = gap(model, task)
    errors = [
        (node_attribution(model, task, "replace_B", steps=m).of([Component("embed")]).total[:, 0] - whole).abs().mean()
        for m in (4, 16)
    ]
    assert errors[1] < errors[0] / 2.5
    assert errors[1] < 0.1 * whole.abs().mean()


CUTS = {
    "gpt_neox": [""],
    "mamba": ["state@-1", "conv_taps", "y", "out"],
    "rwkv": ["out"],
    "falcon_h1": ["state@-1", "conv_taps", "y", "out"],
}


@FOUR
def test_along_the_path_every_cut_has_the_whole_effect(family, task):
    """If layer 1 alone moves anything, what the last position knows of B went through each of these sites and heads."""
    model = tiny_model(family)
    silence(model, layer=0)
    whole = gap(model, task)
    found = node_attribution(model, task, "replace_B", steps=16, method="path")
    heads = [c for c in found.components if c.site == "attn.1.z"]
    for kind in CUTS[family]:
        inner = [c for c in found.components if c.site.startswith(("mamba.1", "rwkv.1")) and f".{kind}" in c.site]
        error = found.of([*heads, *inner]).total.sum(1) - whole
        assert error.abs().mean() < 0.1 * whole.abs().mean(), kind


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_states_positions_are_those_of_its_writes(family, task):
    """As measured by moving single positions' writes a little to and fro."""
    model, site = tiny_model(family), "mamba.1.writes@-1"
    clean, corrupted = (model.run(p, [site]).captured[site] for p in (task.clean, task.corrupted["replace_B"]))
    state = node_attribution(model, task, "replace_B").of([Component("mamba.1.state@-1")]).scores[:, 0]

    def moved(position, share):
        writes = clean.clone()
        writes[:, position] = torch.lerp(clean[:, position], corrupted[:, position], share)
        return measure(model.run(task.clean, edits={site: lambda _: writes}).logits[:, -1], task)[:, 0]

    measured = torch.stack([(moved(p, 0.2) - moved(p, -0.2)) / 0.4 for p in range(LENGTH)], 1)
    torch.testing.assert_close(state, measured, rtol=0.01, atol=0.01 * measured.abs().max().item())
    assert (state.abs() > 0.1 * state.abs().max()).any(0).sum() > 4
    assert state.abs().max() > 1e-3


@FOUR
def test_nothing_is_attributed_to_places_before_the_corruption(family, task):
    """But for states: what was written before B decays otherwise after it."""
    found = node_attribution(tiny_model(family), task, "replace_B")
    found = found.of(c for c in found.components if "state" not in c.site)
    before = torch.arange(LENGTH)[None, :] < task.positions["B"][:, None]
    assert found.scores.transpose(1, 2)[before].abs().max() < 1e-6 * found.scores.abs().max()
    embed = found.of([Component("embed")])
    torch.testing.assert_close(embed.at(task.positions["B"]), embed.total)
    assert embed.at(task.positions["B"] - LENGTH).isnan().all()


def test_batches_together_are_the_whole(task):
    model = tiny_model("falcon_h1")
    nodes = [node_attribution(model, task, "replace_B", steps=2, batch_size=n).scores for n in (1, 4)]
    edges = [edge_attribution(model, task, "replace_B", batch_size=n).scores for n in (1, 4)]
    for one, other in (nodes, edges):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@FOUR
def test_cut_edges_add_up_to_what_is_known(family, task):
    """None cut: the clean run. All: the corrupted one. All of one writer: that writer patched."""
    model = model_of(family)
    graph = graph_of(model)
    patching = EdgePatching(model, graph, task, "replace_B")
    clean, corrupted = (model.run(p).logits[:, -1] for p in (task.clean, task.corrupted["replace_B"]))
    torch.testing.assert_close(patching.logits(graph.exists), clean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patching.logits(~graph.exists), corrupted, rtol=1e-4, atol=1e-5)
    effects = patched_effects(model, task, "replace_B", graph.writers)
    for u in range(len(graph.writers)):
        keep = graph.exists
        keep[u] = False
        effect = (measure(patching.logits(keep), task) - measure(clean, task))[:, 0]
        torch.testing.assert_close(effect, effects[:, u], rtol=1e-3, atol=1e-5)


def test_patched_effects_are_path_patchings_total_ones(family, task):
    model = tiny_model(family)
    totals = {
        e.sender: e.values[:, 0] for e in PatchingBatch(model, task, "replace_B").to_logits() if e.path == "total"
    }
    effects = patched_effects(model, task, "replace_B", totals, batch_size=3)
    torch.testing.assert_close(effects, torch.stack(list(totals.values()), 1), rtol=1e-4, atol=1e-5)


def planted():
    """A GPT-NeoX in which only head L1H0 moves anything between positions: it reads the token and the first MLP."""
    model = tiny_model("gpt_neox")
    for layer, block in enumerate(model.hf.gpt_neox.layers):
        block.attention.dense.weight[:, 8 * layer :] = 0
    return model


def test_a_planted_circuit_is_found_and_is_faithful_and_complete(task):
    model = planted()
    nodes = components(model, WRITERS, embed=False)
    found = node_attribution(model, task, "replace_B").of(nodes).total.mean(0)
    assert {nodes[i].name for i in found.abs().topk(2).indices} == {"L0 mlp", "L1H0"}
    curve = node_curve(model, task, "replace_B", found, [0, 2, 6], batch_size=3)
    drawn = draws(4, 50, seed=1)
    np.testing.assert_allclose(faithfulness(curve, drawn, 0.9).value, [0, 1, 1], atol=1e-3)
    np.testing.assert_allclose(completeness(curve, drawn, 0.9).value, [1, 0, 0], atol=1e-3)

    graph, scores = edge_attribution(model, task, "replace_B")
    mean = scores.mean(0)
    names = {
        (graph.writers[u].name, graph.readers[r].name)
        for u, r in (mean.abs() > 1e-3 * mean.abs().max()).nonzero().tolist()
    }
    into = {(w, f"L1H0 {kind}") for w in ("embed", "L0 mlp") for kind in ("k", "v")}
    assert names == into | {("embed", "L0 mlp"), ("L1H0", "logits")}
    curve = edge_curve(model, graph, task, "replace_B", mean, [0, 6, int(graph.exists.sum())])
    np.testing.assert_allclose(faithfulness(curve, drawn, 0.9).value, [0, 1, 1], atol=1e-3)
    np.testing.assert_allclose(completeness(curve, drawn, 0.9).value, [1, 0, 0], atol=1e-3)


def test_curves_and_areas_are_their_formulas():
    circuit = np.array([[0.0, 2, 4], [0.0, 4, 4]])
    curve = Curve((0, 1, 4), circuit, circuit[:, ::-1], clean=np.array([5.0, 5]), corrupted=np.array([-1.0, 1]))
    drawn = np.array([[0, 0], [1, 1], [0, 1]])
    value, low, high = faithfulness(curve, drawn, confidence=1.0)
    np.testing.assert_allclose(value, [0, 3 / 5, 4 / 5])
    np.testing.assert_allclose(low, [-1 / 4, 1 / 2, 3 / 4])  # of twice the second prompt, twice the first
    np.testing.assert_allclose(high, [1 / 6, 3 / 4, 5 / 6])
    np.testing.assert_allclose(area(curve, drawn, 0.9).value, [(0.3 + 3 * 0.7) / 4, (0.7 + 3 * 0.3) / 4])
    flat = curve._replace(clean=curve.corrupted)
    assert np.isnan(faithfulness(flat, drawn, 0.9)).all()


def test_agreement_is_spearmans_correlation_and_the_share_of_the_top():
    rng = np.random.default_rng(0)
    effects = torch.from_numpy(rng.normal(size=(30, 12)) + 2 * rng.normal(size=12))
    scores = effects + torch.from_numpy(rng.normal(size=(30, 12)))
    drawn = draws(30, 200, seed=5)
    value, low, high = agreement(scores, effects, 3, drawn, 0.9)
    assert value[0] == pytest.approx(spearmanr(scores.mean(0), effects.mean(0)).statistic)
    top = [set(x.mean(0).abs().topk(3).indices.tolist()) for x in (scores, effects)]
    assert value[1] == pytest.approx(len(top[0] & top[1]) / 3)
    assert (low <= value).all()
    assert (value <= high).all()
    again = [spearmanr(scores[rows].mean(0), effects[rows].mean(0)).statistic for rows in drawn]
    np.testing.assert_allclose([low[0], high[0]], np.quantile(again, [0.05, 0.95]))
    np.testing.assert_allclose(agreement(effects, effects, 3, drawn, 0.9).value, 1)
    assert np.isnan(agreement(torch.zeros(30, 12), effects, 3, drawn, 0.9).value[0])


def test_components_have_names():
    sites = [("embed", None), ("attn.1.z", 2), ("attn.1.k", 0), ("mamba.3.conv_taps", 1), ("mamba.0.state@-1", None)]
    assert [Component(*c).name for c in sites] == ["embed", "L1H2", "L1H0 k", "L3 conv_taps 1", "L0 state"]
    assert [Component(*c).layer for c in sites] == [-1, 1, 1, 3, 0]
    assert LOGITS.name == "logits"


def test_bad_input_is_named(task):
    model = tiny_model("gpt_neox")
    nodes = components(model, WRITERS, embed=False)
    scores = torch.ones(len(nodes))
    with pytest.raises(StudyError, match="induction has no 'swap'; allowed: replace_B, replace_A"):
        node_attribution(model, task, "swap")
    with pytest.raises(StudyError, match="induction has no 'swap'"):
        patched_effects(model, task, "swap", nodes)
    with pytest.raises(StudyError, match="'top1' cannot be taken; allowed: logit_diff, "):
        edge_attribution(model, task, "replace_B", "top1")
    with pytest.raises(StudyError, match="steps: 0 is not at least 1"):
        node_attribution(model, task, "replace_B", steps=0)
    with pytest.raises(StudyError, match="method: 'line' is unknown; allowed: ends, path"):
        node_attribution(model, task, "replace_B", method="line")
    with pytest.raises(StudyError, match="component L0 state: not scored; allowed: L0H0"):
        Attribution(nodes, torch.zeros(4, len(nodes), LENGTH)).of([Component("mamba.0.state@-1")])
    with pytest.raises(StudyError, match=r"sizes: \[0, 7\] do not ascend within 0 .. 6"):
        node_curve(model, task, "replace_B", scores, [0, 7])
    with pytest.raises(StudyError, match=r"scores: have shape \(5,\), the circuit's parts have \(6,\)"):
        node_curve(model, task, "replace_B", scores[1:], [0, 1])
    with pytest.raises(StudyError, match="metric: 'loss' cannot be taken"):
        node_curve(model, task, "replace_B", scores, [0, 1], metric="loss")
    with pytest.raises(StudyError, match=r"k: 0 is not in 1 .. 6"):
        agreement(scores[None], scores[None], 0, draws(1, 20, 0), 0.9)
