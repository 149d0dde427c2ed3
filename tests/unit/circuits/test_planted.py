"""Planted models do the task, by what was planted and by nothing else."""

from itertools import pairwise

import pytest
import torch

from universality.circuits.columns import METRICS
from universality.circuits.component import Component
from universality.circuits.metrics import measure
from universality.circuits.path_patching import PatchingBatch
from universality.circuits.planted import planted_mamba, planted_mamba2, planted_transformer
from universality.circuits.planted.state_space import CODE
from universality.circuits.tasks.induction import CORRUPTIONS, make_task
from universality.errors import StudyError
from universality.models.loading import load_model

VOCAB = 24
STATE_SPACE = {"mamba": planted_mamba, "mamba2": planted_mamba2}
PLANTS = {
    "transformer": lambda vocab_size, **values: planted_transformer(vocab_size, 32, **values),
    **STATE_SPACE,
    "mamba, one layer": lambda vocab_size, **values: planted_mamba(vocab_size, offset=0, own_mover=False, **values),
    "mamba2, one layer": lambda vocab_size, **values: planted_mamba2(vocab_size, offset=2, own_mover=False, **values),
}


@pytest.fixture(params=PLANTS)
def plant(request):
    return PLANTS[request.param]


@pytest.fixture(params=STATE_SPACE)
def plant_state_space(request):
    return STATE_SPACE[request.param]


@pytest.fixture(scope="module")
def task():
    return make_task(4, 16, VOCAB, end_of_text=0, seed=0)


def measured(model, task, tokens) -> dict[str, torch.Tensor]:
    return dict(zip(METRICS, measure(model.run(tokens).logits[:, -1], task).T, strict=True))


def test_every_prompt_is_answered_and_nothing_is_where_A_is_lost(plant):
    task = make_task(32, 32, 40, end_of_text=0, seed=3)
    model = plant(40).model
    clean = measured(model, task, task.clean)
    assert (clean["top1"] == 1).all()
    assert (clean["logit_diff"] > 9.9).all()
    without_B, without_A = (measured(model, task, task.corrupted[name]) for name in CORRUPTIONS)
    assert (without_B["logit_diff"] < -9.9).all()
    assert (without_A["logit_diff"].abs() < 1e-2).all()
    assert (without_A["prob"] < 2 / 40).all()


def senders_of(component: Component) -> set[str]:
    """The names of all senders that hold what the component makes: within a layer, state before y before out."""
    if component.head is not None:
        return {component.name}
    kinds = ("state", "y", "out")
    return {f"L{component.layer} {kind}" for kind in kinds[kinds.index(component.name.split()[1]) :]}


def effects_of(planted, task, corruption) -> dict[str, dict[str, float]]:
    """Of each path, to the logits and through the inducer's input, every sender's mean size of effect."""
    batch = PatchingBatch(planted.model, task, corruption)
    layer, head = planted.inducer.layer, planted.inducer.head
    receiver = planted.inducer if head is not None else Component(f"mamba.{layer}.conv_in")
    found: dict[str, dict[str, float]] = {}
    for effect in (*batch.to_logits(), *batch.to_receiver(receiver, ())):
        path = "to the inducer" if effect.receiver else effect.path
        found.setdefault(path, {})[effect.sender.name] = float(effect.values[:, 0].abs().mean())
    return found


@pytest.mark.parametrize(
    ("corruption", "noise", "at_least"), [("replace_B", 0.0, 1e3), ("replace_A", 0.0, 1e3), ("replace_A", 0.1, 10)]
)
def test_exactly_the_planted_components_have_an_effect(plant, task, corruption, noise, at_least):
    """Replacing B changes what the inducer copies; replacing A what the mover tells it, of which logits see nothing."""
    planted = plant(VOCAB, noise=noise, seed=1)
    inducer, mover = senders_of(planted.inducer), senders_of(planted.mover)
    alone = planted.mover.layer == planted.inducer.layer
    through = set() if corruption == "replace_B" or alone else mover
    expected = {"total": inducer | through, "direct": inducer, "to the inducer": through}
    for path, effects in effects_of(planted, task, corruption).items():
        weakest = min((effects[name] for name in expected[path]), default=9.0)
        strongest_other = max((size for name, size in effects.items() if name not in expected[path]), default=0.0)
        assert weakest > 8, path
        assert weakest > at_least * strongest_other, path


@pytest.mark.parametrize("offset", [0, 1])
def test_the_state_holds_the_pairs_of_the_sequence(plant_state_space, task, offset):
    """A table of what came after what, of all pairs that the last position can have seen."""
    planted = plant_state_space(VOCAB, offset=offset)
    site = planted.inducer.site
    state = planted.model.run(task.clean, capture=[site]).captured[site]
    heads_first = state if state.ndim == 3 else state[:, 0]
    pairs = torch.zeros(len(task.clean), VOCAB, VOCAB)
    for sequence, row in zip(pairs, task.clean.tolist(), strict=True):
        for before, token in list(pairwise(row))[: 15 - offset]:
            sequence[token, before] = 1
    size = CODE if state.ndim == 3 else CODE**2
    torch.testing.assert_close(heads_first[:, :VOCAB] / size, pairs, rtol=1e-3, atol=1e-3)


def test_the_heads_look_where_they_should(task):
    planted = planted_transformer(VOCAB, 16, noise=0.1)
    captured = planted.model.run(task.clean, capture=["attn.0.pattern", "attn.2.pattern"]).captured
    mover = captured["attn.0.pattern"][:, planted.mover.head]
    before = torch.arange(15)
    assert (mover[:, before + 1, before] > 0.999).all()
    inducer, rows = captured["attn.2.pattern"][:, planted.inducer.head], torch.arange(4)
    assert (inducer[rows, -1, task.positions["B"]] > 0.999).all()
    assert (inducer[:, 1:-1, 0] > 0.95).all()  # no token has come before: position 0, which says nothing


@pytest.mark.parametrize("name", ["transformer", "mamba", "mamba2"])
def test_a_planted_model_can_be_saved_and_loaded(name, task, tmp_path):
    model = PLANTS[name](VOCAB, noise=0.1).model
    model.hf.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)  # which holds it against transformers' own forward
    assert torch.equal(loaded.run(task.clean).logits, model.run(task.clean).logits)


def test_the_seed_draws_the_noise_and_only_that(plant, task):
    def logits(**values):
        return plant(VOCAB, **values).model.run(task.clean).logits

    assert torch.equal(logits(noise=0.1, seed=1), logits(noise=0.1, seed=1))
    assert not torch.equal(logits(noise=0.1, seed=1), logits(noise=0.1, seed=2))
    torch.testing.assert_close(logits(seed=1), logits(seed=2), rtol=0, atol=1e-4)


def test_what_cannot_be_planted_is_an_error():
    with pytest.raises(StudyError, match="end_of_text: 9 is no token of a vocabulary of 9"):
        planted_transformer(9, 8, end_of_text=9)
    with pytest.raises(StudyError, match="noise: -1 is not a finite number of at least 0"):
        planted_mamba(9, noise=-1)
    with pytest.raises(StudyError, match="length: 0 is not at least 1"):
        planted_transformer(9, 0)
    for plant in STATE_SPACE.values():
        with pytest.raises(StudyError, match="offset: 4 is out of the convolution's reach; allowed: 0 to 3"):
            plant(9, offset=4)
        with pytest.raises(StudyError, match="offset: 3 is out of the convolution's reach; allowed: 0 to 2"):
            plant(9, offset=3, own_mover=False)
