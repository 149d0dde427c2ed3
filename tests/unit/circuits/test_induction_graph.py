"""Graphs of planted circuits are what was planted, and paths are those of plain path patching."""

import json
from functools import cache

import pytest
import torch

from tests.conftest import LENGTH, tiny_model
from universality.circuits.component import LOGITS, Component
from universality.circuits.graph_similarity import similarity
from universality.circuits.induction_graph import Criteria, induction_graph
from universality.circuits.induction_paths import Way, carried, inputs_of, moved, onwards, ways_into
from universality.circuits.metrics import measure
from universality.circuits.path_patching import PatchingBatch
from universality.circuits.planted import Planted, planted_mamba, planted_mamba2, planted_transformer
from universality.circuits.planted.state_space import CODE, see
from universality.circuits.roles import Edge, InductionGraph, Node, Share, graph_of_dict
from universality.circuits.tasks.induction import make_task
from universality.errors import StudyError

VOCAB = 20
CRITERIA = Criteria(bootstrap_seed=3, bootstrap_samples=100)
TASK = make_task(8, 16, VOCAB, end_of_text=0, seed=0)
PLANTS = {
    "transformer": (lambda: planted_transformer(VOCAB, 16, noise=0.02), "k"),
    "mamba": (lambda: planted_mamba(VOCAB, offset=1, noise=0.02), "conv 1 back"),
    "mamba, not off by one": (lambda: planted_mamba(VOCAB, offset=0), "conv 0 back"),
    "mamba, one layer": (lambda: planted_mamba(VOCAB, offset=1, own_mover=False), "conv 2 back"),
    "mamba2, one layer": (lambda: planted_mamba2(VOCAB, offset=0, own_mover=False), "conv 1 back"),
}


@cache
def found(name: str) -> tuple[Planted, InductionGraph]:
    planted = PLANTS[name][0]()
    return planted, induction_graph(planted.model, TASK, CRITERIA, batch_size=8)


def parts(graph: InductionGraph) -> dict[tuple, float]:
    """Who has which role, and all edges, with their shares."""
    nodes = {(node.component, node.role): node.share.value for node in graph.nodes}
    return nodes | {(edge.source, edge.target, edge.by): edge.share.value for edge in graph.edges}


@pytest.mark.parametrize("name", PLANTS)
def test_the_graph_is_what_was_planted(name):
    planted, graph = found(name)
    expected = [
        (planted.mover, "mover"),
        (planted.inducer, "inducer"),
        (planted.mover, planted.inducer, PLANTS[name][1]),
        (planted.inducer, LOGITS, "stream"),
    ]
    assert parts(graph) == {part: pytest.approx(1, abs=0.02) for part in expected}
    assert [node.depth for node in graph.nodes] == [c.layer / 3 for c in (planted.mover, planted.inducer)]
    for node in graph.nodes:
        assert node.share.low <= node.share.value <= node.share.high
    assert graph.accuracy == 1
    assert graph.passes


def with_mlp(model):
    """Layer 3's MLP writes once more the answer that it reads. Norms expect three codes where there are four."""
    block, answer = model.hf.transformer.h[3], 2 * (VOCAB + 1)
    block.mlp.c_fc.weight.zero_()
    block.mlp.c_proj.weight.zero_()
    for token in range(VOCAB):
        block.mlp.c_fc.weight[answer + token, token] = 20
        block.mlp.c_proj.weight[token, answer + token] = 1 / (
            20 * (3 / 4) ** 0.5
        )  # four codes where norms expect three
    return Component("mlp.3.out")


def with_head(model):
    """L3H0 looks at its own position alone and does the same."""
    block, width = model.hf.transformer.h[3], VOCAB + 1
    answer, position, q, k, v = 2 * width, 3 * width, 0, 4 * width, 8 * width
    block.attn.c_attn.weight[:, [*range(q, q + width), *range(k, k + width), *range(v, v + width)]] = 0
    block.attn.c_proj.weight[:width] = 0
    for n in range(width):
        block.attn.c_attn.weight[position + n, q + n] = 30 * width**0.5
        block.attn.c_attn.weight[[position + n, answer + n], [k + n, v + n]] = 1
        block.attn.c_proj.weight[n, answer + n] = (4 / 3) ** 0.5
    return Component("attn.3.z", 0)


def with_mixer(model):
    """Layer 3's skip does."""
    mixer, answer = model.hf.backbone.layers[3].mixer, 2 * VOCAB
    for weight in (mixer.in_proj.weight[: mixer.intermediate_size], mixer.conv1d.weight, mixer.out_proj.weight):
        weight.zero_()
    mixer.in_proj.weight[mixer.intermediate_size :].zero_()
    mixer.in_proj.weight[mixer.intermediate_size :, 3 * VOCAB] = 8
    see(mixer, 0, answer, VOCAB, back=0)
    mixer.D[:] = 1
    for token in range(VOCAB):
        mixer.out_proj.weight[answer + token, token] = (4 / 3) / CODE**2
    return Component("mamba.3.out")


@pytest.mark.parametrize(
    ("plant", "change"), [("transformer", with_mlp), ("transformer", with_head), ("mamba, not off by one", with_mixer)]
)
@torch.no_grad()
def test_what_hands_the_answer_on_is_an_output_and_no_inducer(plant, change):
    planted = planted_transformer(VOCAB, 16) if plant == "transformer" else planted_mamba(VOCAB, offset=0)
    output = change(planted.model)
    graph = induction_graph(planted.model, TASK, CRITERIA, batch_size=8)
    values = parts(graph)
    assert graph.having("inducer") == [planted.inducer]
    assert graph.having("output") == [output]
    assert values[output, "output"] == pytest.approx(0.5, abs=0.05)
    assert values[planted.inducer, output, "stream"] == pytest.approx(0.5, abs=0.05)
    assert values[planted.inducer, LOGITS, "stream"] == pytest.approx(0.5, abs=0.05)
    assert len(values) == 6  # mover and its edge as well


@torch.no_grad()
def test_heads_that_do_the_same_share_a_role():
    planted, width = planted_transformer(VOCAB, 16), VOCAB + 1
    attention, d_model = planted.model.hf.transformer.h[2].attn, 4 * width
    for start in (0, d_model, 2 * d_model):  # head 2 becomes head 1, and both write half
        of = [slice(start + head * width, start + (head + 1) * width) for head in (1, 2)]
        attention.c_attn.weight[:, of[1]] = attention.c_attn.weight[:, of[0]]
        attention.c_attn.bias[of[1]] = attention.c_attn.bias[of[0]]
    attention.c_proj.weight[2 * width : 3 * width] = attention.c_proj.weight[width : 2 * width] / 2
    attention.c_proj.weight[width : 2 * width] /= 2
    values = parts(induction_graph(planted.model, TASK, CRITERIA, batch_size=8))
    twins = [planted.inducer, Component("attn.2.z", 2)]
    left = 0.5 * (8 / 6.5) ** 0.5  # of the answer without one of the two; a norm makes more of half a code
    expected = {(planted.mover, "mover"): 2 * (1 - left)} | {(twin, "inducer"): 0.5 for twin in twins}
    expected |= {(planted.mover, twin, "k"): 1 - left for twin in twins}
    expected |= {(twin, LOGITS, "stream"): 0.5 for twin in twins}
    assert values == pytest.approx(expected, abs=0.02)


@torch.no_grad()
def test_a_head_that_copies_all_tokens_alike_is_no_inducer():
    planted, width = planted_transformer(VOCAB, 16), VOCAB + 1
    attention = planted.model.hf.transformer.h[2].attn
    attention.c_attn.weight[:, width : 2 * width] = 0  # nothing is asked for, so that all positions count the same
    attention.c_attn.bias.zero_()
    reached = dict(carried(planted.model, "replace_B", TASK))
    assert reached[planted.inducer].max() < -1
    graph = induction_graph(planted.model, TASK, CRITERIA._replace(min_accuracy=0), batch_size=8)
    assert graph == InductionGraph(4, graph.accuracy, True)


@pytest.mark.parametrize("family", ["gpt_neox", "mamba", "rwkv", "falcon_h1"])
def test_a_random_model_has_no_circuit(family):
    task = make_task(16, LENGTH, 50, end_of_text=0, seed=1)
    model = tiny_model(family)
    graph = induction_graph(model, task, CRITERIA._replace(min_accuracy=0))
    assert graph == InductionGraph(2, graph.accuracy, True)
    assert not induction_graph(model, task, CRITERIA).passes
    assert similarity(graph, graph) is None
    assert similarity(graph, found("mamba")[1]) is None


def inducer_of(model) -> Component:
    kinds = (Component("attn.1.z", 1), Component("mamba.1.state@-1"), Component("rwkv.1.out"))
    return next(c for c in kinds if c.site.replace("-1", "P") in model.sites)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mamba", "mamba2", "rwkv", "falcon_h1"])
def test_ways_are_those_of_plain_path_patching(family):
    """Through all inputs of an inducer; and along the stream, which from the last layer is the direct path."""
    model, task = tiny_model(family), make_task(4, LENGTH, 50, end_of_text=0, seed=0)
    inducer = inducer_of(model)
    batch = PatchingBatch(model, task, "replace_A")
    receiver = inducer if "@" not in inducer.site else Component("mamba.1.conv_in")
    plain = {e.sender: e.values[:, 0] for e in batch.to_receiver(receiver, ())}
    ways = dict(moved(model, "replace_A", ways_into(model, inducer), task))
    below = {way.source: effect for way, effect in ways.items() if way.source.layer == 0}
    assert len(below) == {"gpt_neox": 2, "llama": 2, "rwkv": 2, "falcon_h1": 3}.get(family, 1)
    for source, effect in below.items():
        torch.testing.assert_close(effect, plain[source], rtol=1e-3, atol=1e-5)
    assert max(effect.abs().max() for effect in below.values()) > 1e-3
    batch = PatchingBatch(model, task, "replace_B")
    direct = {e.sender: e.values[:, 0] for e in batch.to_logits(paths=["direct"])}
    if family not in ("llama", "rwkv", "falcon_h1"):  # whose last MLP comes after the mixer
        stream = dict(onwards(model, "replace_B", [inducer], [], task))[Way(inducer, LOGITS, "stream")]
        torch.testing.assert_close(stream, direct[inducer], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("family", "site"), [("mamba", "conv_taps"), ("falcon_h1", "conv_taps"), ("rwkv", "k")])
def test_a_layers_own_look_back_is_all_that_leaves_the_place_of_A(family, site):
    """In layer 0, below which nothing moves: what the corrupted run has there, at later positions."""
    model, task = tiny_model(family), make_task(4, LENGTH, 50, end_of_text=0, seed=0)
    if family == "rwkv":
        model.hf.get_input_embeddings().weight.mul_(1e4)
    inducer = Component("rwkv.0.out" if family == "rwkv" else "mamba.0.state@-1")
    (own,) = ways_into(model, inducer)
    apart = inputs_of(model, own)
    assert [way.by for way in apart] == (["k", "v"] if family == "rwkv" else [f"conv {n} back" for n in (1, 2, 3)])
    effects = dict(moved(model, "replace_A", [own, *apart], task))
    name = f"{inducer.site.split('.')[0]}.0.{site}"
    corrupted = model.run(task.corrupted["replace_A"], capture=[name]).captured[name]
    rows = torch.arange(4)
    clean = measure(model.run(task.clean).logits[:, -1], task)[:, 0]

    def put(value, backs):
        value = value.clone()
        for back in backs:
            at = task.positions["A"] + back
            here = (rows, at) if family == "rwkv" else (rows, at, 3 - back)
            value[here] = corrupted[here]
        return value

    for back in (1,) if family == "rwkv" else (1, 2, 3):
        edited = model.run(task.clean, edits={name: lambda value, back=back: put(value, [back])})
        expected = measure(edited.logits[:, -1], task)[:, 0] - clean
        torch.testing.assert_close(effects[apart[back - 1]], expected, rtol=1e-3, atol=1e-5)
    assert effects[own].abs().max() > 1e-4


def test_graphs_of_one_circuit_are_alike_in_any_family():
    graphs = {name: found(name)[1] for name in PLANTS}
    for graph in graphs.values():
        assert similarity(graph, graph) == (1, 1, 1)
    assert similarity(graphs["transformer"], graphs["mamba"]).score > 0.98
    assert similarity(graphs["mamba, one layer"], graphs["mamba2, one layer"]).score > 0.98
    other = similarity(graphs["transformer"], graphs["mamba, one layer"])
    assert other == pytest.approx((0.5, 2 / 3, 1 / 3), abs=0.02)  # movers 2/3 apart, one of three kinds of edge shared


def graph_with(*nodes: tuple[int, str, float], edges: tuple[Edge, ...] = ()) -> InductionGraph:
    made = tuple(Node(Component(f"attn.{n}.z", 0), n / 10, role, Share(x, x, x)) for n, role, x in nodes)
    return InductionGraph(11, 1.0, True, made, edges)


def test_similarity_is_its_formula():
    edge = Edge(Component("attn.5.z", 0), LOGITS, "stream", Share(0.8, 0.8, 0.8))
    a = graph_with((2, "mover", 0.6), (4, "mover", 0.2), (5, "inducer", 0.8), edges=(edge,))
    b = graph_with((4, "mover", 0.4), (9, "inducer", 0.5), (10, "output", 0.3))
    found = similarity(a, b)
    depths = ((1 - 0.15) * 0.8 + (1 - 0.4) * 0.8 + 0 * 0.3) / 1.9
    assert found == pytest.approx((depths / 2, depths, 0))
    assert similarity(b, a) == pytest.approx(found)
    assert similarity(b, b) == (1, 1, 1)


def test_the_same_input_gives_the_same_text_in_batches_of_any_size():
    planted, graph = found("mamba")
    text = json.dumps(graph.to_dict())
    assert graph_of_dict(json.loads(text)) == graph
    assert json.dumps(induction_graph(planted.model, TASK, CRITERIA, batch_size=8).to_dict()) == text
    split = induction_graph(planted.model, TASK, CRITERIA, batch_size=3)
    assert parts(split) == pytest.approx(parts(graph), abs=1e-4)


def test_what_cannot_be_searched_is_an_error():
    model = tiny_model("gpt_neox")
    with pytest.raises(StudyError, match="min_share: 0 is not between 0 and 1"):
        induction_graph(model, TASK, CRITERIA._replace(min_share=0))
    with pytest.raises(StudyError, match="min_accuracy: 2 is not within 0 .. 1"):
        induction_graph(model, TASK, CRITERIA._replace(min_accuracy=2))
    with pytest.raises(StudyError, match="1 prompt; a test over prompts needs at least 2"):
        induction_graph(model, TASK.part(slice(1)), CRITERIA)
    with pytest.raises(StudyError, match="corruption 'replace_A': task induction has replace_B"):
        induction_graph(model, TASK._replace(corrupted={"replace_B": TASK.clean}), CRITERIA)
    with pytest.raises(StudyError, match="bootstrap_samples: 0 is not at least 1"):
        induction_graph(model, TASK, CRITERIA._replace(bootstrap_samples=0))
