"""Untrained models: another model's config, weights drawn anew."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import LENGTH, tiny_model, tiny_settings
from universality.corpus.tokenizer import identity, load_tokenizer
from universality.corpus.tokens import read_tokens
from universality.errors import StudyError
from universality.models.commands import make
from universality.models.initialisation import write_untrained
from universality.models.loading import load_model
from universality.models.settings import UntrainedModel
from universality.models.training import new_model


@pytest.fixture
def trained(corpus, tmp_path, family):
    """A folder as the models stage makes it, with weights that no initialisation draws."""
    tiny_model(family, vocab_size=304).hf.save_pretrained(tmp_path / "trained")
    load_tokenizer(corpus / "tokenizer").save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def untrained(trained, family, seed: int, **changes):
    settings = UntrainedModel(family=family, n_layers=2, d_model=16, like="trained", seed=seed)
    out = trained.parent / f"untrained_{seed}"
    write_untrained("mine", settings.model_copy(update=changes), trained, out)
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_is_another_model_of_the_same_shape(trained, family):
    one, other = untrained(trained, family, 7), untrained(trained, family, 8)
    assert contents(one).keys() == contents(trained).keys()
    for name, content in contents(trained).items():
        if name != "model.safetensors":
            assert contents(one)[name] == content, name
    before, weights, others = (load_file(folder / "model.safetensors") for folder in (trained, one, other))
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in before.items()}
    drawn = [name for name, w in weights.items() if not torch.equal(w, others[name])]
    assert sum(weights[name].numel() for name in drawn) > 0.9 * sum(w.numel() for w in weights.values() if w.ndim > 1)
    assert all(not torch.equal(weights[name], before[name]) for name in drawn)


def test_same_seed_same_bytes(trained, family):
    first = contents(untrained(trained, family, 7))
    torch.rand(3)  # whatever was drawn before
    assert contents(untrained(trained, family, 7)) == first


def test_it_runs_and_every_token_is_about_as_likely(trained, family):
    model = load_model(untrained(trained, family, 7))
    tokens = torch.randint(0, 300, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    logits = model.run(tokens).logits
    assert torch.isfinite(logits).all()
    assert float(model.loss(tokens)) == pytest.approx(torch.tensor(304.0).log().item(), abs=1.0)


def test_with_the_seed_of_a_training_it_has_the_weights_that_the_training_began_with(corpus, tmp_path, family):
    settings = tiny_settings(family, seed=5)
    start = new_model(settings, read_tokens(corpus / "tokens", "train")).hf
    start.save_pretrained(tmp_path / "trained")
    load_tokenizer(corpus / "tokenizer").save_pretrained(tmp_path / "trained")
    folder = untrained(tmp_path / "trained", family, 5)
    assert contents(folder) == contents(tmp_path / "trained")
    assert identity(load_tokenizer(folder)) == identity(load_tokenizer(corpus / "tokenizer"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "mamba"}, "is of family gpt_neox, the study says mamba"),
        ({"n_layers": 3}, "has 2 layers, the study says n_layers=3"),
        ({"d_model": 32}, "has width 16, the study says d_model=32"),
    ],
)
@pytest.mark.parametrize("family", ["gpt_neox"], indirect=True)
def test_a_folder_that_is_not_what_the_study_says(trained, family, change, message):
    with pytest.raises(StudyError, match=rf"models\.zoo\.mine \(like .*trained\): {message}"):
        untrained(trained, seed=7, **{"family": family} | change)
    assert not (trained.parent / "untrained_7").exists()


@pytest.mark.parametrize("family", ["gpt_neox"], indirect=True)
def test_a_folder_that_is_no_models(trained, family):
    (trained / "config.json").write_text("{")
    with pytest.raises(StudyError, match=r"models\.zoo\.mine \(like .*trained\): not a readable") as caught:
        untrained(trained, family, 7)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("like", [True, False])
@pytest.mark.parametrize("family", ["gpt_neox"], indirect=True)
def test_the_command_wants_the_other_folder_where_it_is_needed(trained, corpus, like):
    source = {"source": "folder", "path": str(trained)} if like else {"source": "untrained", "like": "neox", "seed": 1}
    model = source | {"family": "gpt_neox", "n_layers": 2, "d_model": 16}
    folders = {"tokens": corpus / "tokens", "tokenizer": corpus / "tokenizer", "out": trained.parent / "out"}
    with pytest.raises(StudyError, match=f"--like is for source untrained.*; this is {source['source']}"):
        make("mine", json.dumps({"model": model}), **folders, like=trained if like else None)
    assert not folders["out"].exists()
