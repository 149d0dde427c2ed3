import numpy as np
import pytest
import torch

from tests.conftest import LENGTH, tiny_settings
from universality.corpus.tokens import read_tokens
from universality.errors import StudyError
from universality.models import training as training_module
from universality.models.batches import IGNORED, Batches
from universality.models.induction import induction_score, repeated_sequences
from universality.models.loading import load_model
from universality.models.settings import TrainingSettings
from universality.models.training import train_model


def training_settings(**changes) -> TrainingSettings:
    values = {"repeat_fraction": 0.5, "uniform_fraction": 0.5, "shuffled_fraction": 0.5}
    values |= {"min_segment": 3, "min_induction_gain": -1.0}
    values |= {"warmup_fraction": 0.2, "decay_fraction": 0.2, "weight_decay": 0.1}
    return TrainingSettings(**values | {"evaluation_sequences": 8, "checkpoint_steps": 2} | changes)


def test_batches_repeat_and_mask_what_nothing_foretells(corpus):
    sequences = read_tokens(corpus / "tokens", "train")
    tokens, labels = Batches(sequences, training_settings(shuffled_fraction=0.0), 32, seed=1).at(5)
    assert tokens.shape == labels.shape == (32, LENGTH)
    for row, label in zip(tokens[:16].numpy(), labels[:16].numpy(), strict=True):
        period = next(p for p in range(3, LENGTH) if np.array_equal(row[1 + p :], row[1:-p]))
        learned = np.flatnonzero(label != IGNORED)
        assert np.array_equal(row[learned], label[learned])
        # The first token of the second copy, at 1 + period, is masked as well.
        assert learned.min() == 2 + period
    assert torch.equal(tokens[16:], labels[16:])


def test_shuffled_copies_are_of_the_segments_pairs_and_only_their_seconds_are_learned(corpus):
    sequences = read_tokens(corpus / "tokens", "train")
    settings = training_settings(shuffled_fraction=1.0, uniform_fraction=1.0)
    tokens, labels = Batches(sequences, settings, 64, seed=1).at(5)
    shuffled = 0
    for row, label in zip(tokens[:32].tolist(), labels[:32].tolist(), strict=True):
        learned = [t for t, one in enumerate(label) if one != IGNORED]
        start = learned[0] - 1  # of the second copy
        assert learned == list(range(start + 1, LENGTH, 2))
        pairs = [(row[t], row[t + 1]) for t in range(1, start - 1, 2)]
        later = [(row[t - 1], row[t]) for t in learned]
        copies = [later[k : k + len(pairs)] for k in range(0, len(later), len(pairs))]
        for copy in copies:
            assert sorted(copy) == sorted(pairs) if len(copy) == len(pairs) else set(copy) <= set(pairs)
            shuffled += copy != pairs[: len(copy)]
    assert shuffled > 32
    assert torch.equal(labels[:32][labels[:32] != IGNORED], tokens[:32][labels[:32] != IGNORED])


def test_a_batch_depends_on_its_step_alone(corpus):
    sequences = read_tokens(corpus / "tokens", "train")
    one, other = (Batches(sequences, training_settings(), 8, seed=1) for _ in range(2))
    one.at(0)
    assert torch.equal(one.at(7)[0], other.at(7)[0])
    assert not torch.equal(one.at(7)[0], one.at(8)[0])


class Copier:
    """A stand-in with perfect induction: after a token it says what followed that token before."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def run(self, tokens):
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for b, row in enumerate(tokens.tolist()):
            follows = {}
            for t, token in enumerate(row):
                if t:
                    follows[row[t - 1]] = token
                if token in follows:
                    logits[b, t, follows[token]] = 100.0
        return type("Run", (), {"logits": logits})


def test_induction_score_of_perfect_and_of_ignorant_models():
    sequences = repeated_sequences(20, 41, 5000, 0, seed=3)
    perfect = induction_score(Copier(5000), sequences)
    assert perfect.second_half > -1
    assert perfect.top1 > 0.98
    assert perfect.gain > 7
    uniform = type("Uniform", (), {"run": lambda self, t: type("R", (), {"logits": torch.zeros(*t.shape, 5000)})})()
    ignorant = induction_score(uniform, sequences)
    assert ignorant.gain == pytest.approx(0, abs=1e-5)
    assert ignorant.first_half == pytest.approx(-np.log(5000), abs=1e-3)


def train(corpus, folder, family, settings=None, model=None):
    checkpoint = folder / "checkpoint.pt"
    train_model(
        "tiny", model or tiny_settings(family), settings or training_settings(),
        corpus / "tokens", corpus / "tokenizer", checkpoint, folder / "model",
    )  # fmt: skip
    return folder / "model"


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_killed_training_goes_on_to_the_same_bytes(corpus, tmp_path, family, monkeypatch):
    whole = train(corpus, tmp_path / "whole", family)
    assert not (tmp_path / "whole" / "checkpoint.pt").exists()

    class Killed(BaseException):
        pass

    batches_at = Batches.at

    def die_at_step_5(self, step):
        if step == 5:
            raise Killed
        return batches_at(self, step)

    monkeypatch.setattr(training_module.Batches, "at", die_at_step_5)
    with pytest.raises(Killed):
        train(corpus, tmp_path / "killed", family)
    assert not (tmp_path / "killed" / "model").exists()
    seen = []
    monkeypatch.setattr(training_module.Batches, "at", lambda self, step: seen.append(step) or batches_at(self, step))
    resumed = train(corpus, tmp_path / "killed", family)
    assert seen == [4, 5]
    assert contents(resumed) == contents(whole)


def test_a_checkpoint_of_other_settings_is_not_used(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    trainer_run = training_module._Trainer.run
    monkeypatch.setattr(training_module.Path, "unlink", lambda self, missing_ok=False: None)
    train(corpus, folder, "gpt_neox")
    assert (folder / "checkpoint.pt").exists()
    starts = []
    monkeypatch.setattr(
        training_module._Trainer, "run", lambda self, c: starts.append(self.step) or trainer_run(self, c)
    )
    train(corpus, folder, "gpt_neox", model=tiny_settings("gpt_neox", seed=2))
    assert starts == [0]


def test_the_trained_folder_is_a_transformers_model_with_its_tokenizer(corpus, tmp_path, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = train(corpus, tmp_path, family)
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("a model learns", return_tensors="pt").input_ids
    torch.testing.assert_close(load_model(folder).run(ids).logits, hf(ids).logits, rtol=1e-4, atol=1e-4)


def test_training_that_never_shows_induction_fails_with_one_line(corpus, tmp_path):
    with pytest.raises(StudyError, match=r"models\.zoo\.tiny: after 6 steps .* min_induction_gain=5\.0"):
        train(corpus, tmp_path, "gpt_neox", training_settings(min_induction_gain=5.0))
    assert not (tmp_path / "model").exists()


def test_a_loss_that_is_not_finite_stops_training(corpus, tmp_path):
    with pytest.raises(StudyError, match=r"loss at step \d+ is (nan|inf)"):
        train(corpus, tmp_path, "gpt_neox", model=tiny_settings("gpt_neox", learning_rate=1e30, steps=20))


def test_a_damaged_checkpoint_is_not_used(corpus, tmp_path):
    whole = train(corpus, tmp_path / "whole", "gpt_neox")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK damaged")
    assert contents(train(corpus, tmp_path / "run", "gpt_neox")) == contents(whole)
