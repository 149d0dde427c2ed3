from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_model
from universality.config import check_study, load_study
from universality.models.language_model import LanguageModel
from universality.study import needs as needs_of

ROOT = Path(__file__).parents[2]
SMOKE = yaml.safe_load((ROOT / "studies" / "smoke.yaml").read_text())
PAPER = load_study(ROOT / "studies" / "paper.yaml")


def by_stage(study):
    found: dict[str, list] = {}
    for need in needs_of.needs(study):
        found.setdefault(need.stage, []).append(need)
    return found


def test_the_papers_needs_are_those_worked_out_by_hand():
    found = by_stage(PAPER)
    train = sum(need.disk for need in found["activations"] if "train" in need.what)
    rows = 9780 * 1023
    assert train == pytest.approx(36 * rows * (768 * 2 + 20))
    saes = sum(need.disk for need in found["saes"])
    assert saes == pytest.approx(3 * 36 * 4 * (2 * 768 + 1) * 24_576)
    forward = next(need for need in found["activations"] if "pythia train" in need.what)
    # 12 blocks of 12 d^2, two operations a weight; the unembedding is not computed
    assert forward.operations == pytest.approx(2 * 12 * 12 * 768**2 * 9780 * 1024)


def test_parameters_are_about_those_of_a_real_model(family):
    model: LanguageModel = tiny_model(family, vocab_size=300, n_layers=4, d_model=64, n_heads=4)
    study = check_study(SMOKE | {"corpus": SMOKE["corpus"] | {"tokenizer": {"kind": "bpe", "vocab_size": 300}}}, "x")
    settings = study.models.zoo["neox"].model_copy(update={"family": family, "n_layers": 4, "d_model": 64})
    counted = sum(p.numel() for p in model.hf.parameters())
    assert needs_of._weights(study, settings)[0] == pytest.approx(counted, rel=0.4)


def test_an_untrained_model_takes_no_training():
    [need] = [need for need in by_stage(check_study(SMOKE, "x"))["models"] if need.what.startswith("neox_untrained:")]
    [trained] = [need for need in by_stage(check_study(SMOKE, "x"))["models"] if need.what.startswith("neox:")]
    assert need.operations == 0 < trained.operations
    assert need.disk == trained.disk
    assert need.what.endswith("parameters, untrained")


def test_a_model_counts_the_vocabulary_of_its_own_tokenizer():
    others = {"other_tokenizers": {"large": {"kind": "bpe", "vocab_size": 1512}}}
    study = check_study(SMOKE | {"corpus": SMOKE["corpus"] | others}, "x")
    model = study.models.zoo["neox"]
    own, shared = (needs_of._weights(study, model.model_copy(update={"tokenizer": name})) for name in ("large", None))
    assert own[0] - shared[0] == 2 * 1000 * model.d_model


def test_a_stream_trades_disk_for_time():
    store, stream = (
        by_stage(check_study(SMOKE | {"activations": SMOKE["activations"] | {"train": train}}, "x"))
        for train in ("store", "stream")
    )
    assert sum(n.disk for n in stream["activations"]) < sum(n.disk for n in store["activations"])
    assert sum(n.operations for n in stream["saes"]) > sum(n.operations for n in store["saes"])


def test_the_rate_is_that_of_a_product():
    rate = needs_of.product_rate()
    assert 1e8 < rate < 1e15


def test_the_table_ends_with_the_total():
    found = needs_of.needs(PAPER)
    lines = needs_of.table(found, 1e12).splitlines()
    assert len(lines) == len(found) + 3
    assert lines[-1] == needs_of.total_line(found, 1e12)
    assert lines[-1].startswith("This study needs about 933 GB of disk, and about ")
