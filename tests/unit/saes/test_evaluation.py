"""Metrics of dictionaries against plain numpy, scikit-learn and transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import r2_score
from transformers import AutoModelForCausalLM

from tests.conftest import tiny_model, write_store
from universality.activations.cache import cache_shard
from universality.activations.sample import read_sample
from universality.activations.settings import ShardSettings
from universality.activations.store import ActivationStore
from universality.alignment.bootstrap import resample_weights
from universality.errors import StudyError
from universality.saes.build import build_sae
from universality.saes.evaluation import StoredSums, evaluate
from universality.saes.folder import save_sae
from universality.saes.load import load_sae
from universality.saes.metrics import FREQUENCY_BINS, SCHEMA, frequency_counts, gather
from universality.saes.placement import Evaluated, place
from universality.saes.settings import (
    CrosscoderSettings,
    EvaluationRun,
    EvaluationSettings,
    ReluL1Settings,
    TranscoderSettings,
)
from universality.storage import read_table, write_json

AUX = {"k": 3, "k_aux": 8, "aux_coefficient": 0.03125}
D, SHARDS, SEQUENCES = 16, 10, 12  # width; shards of so many sequences
SITES = ["resid_post.0", "resid_pre.1", "mlp.1.out", "embed"]
RUN = EvaluationRun(sample_seed=3, products="float32", device="cpu")
HOW = ShardSettings(
    sample_seed=3, shard_sequences=SEQUENCES, batch_size=8, products="float32", device="cpu", dtype="fp32"
)
NEOX = ("gpt_neox", "resid_post.0")
MAMBA = ("mamba", "resid_post.0")


def settings(**changes) -> EvaluationSettings:
    values = {"sequences": 20, "batch_size": 6, "rows": 100, "bootstrap_seed": 1, "bootstrap_samples": 40}
    return EvaluationSettings(**values | {"confidence": 0.9} | changes)


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """Models and held-out activations of two families."""
    out = tmp_path_factory.mktemp("evaluation")
    for family, sites in (("gpt_neox", SITES), ("mamba", SITES[:1])):
        tiny_model(family, vocab_size=300).hf.save_pretrained(out / family)
        for shard in range(SHARDS):
            cache_shard(out / family, sites, corpus / "tokens", "evaluation", shard, HOW, out / "activations" / family)
    return out


def shards(folder: Path, sources, n: int = SHARDS) -> list[Path]:
    below = [folder / "activations" / model / site / "evaluation" for model, site in dict.fromkeys(sources)]
    return [path / f"shard_{number}" for path in below for number in range(n)]


def stored(folder: Path, source, n: int = SHARDS) -> tuple[torch.Tensor, np.ndarray]:
    """(values [T, d], document of each row)."""
    store = ActivationStore(shards(folder, [source], n))
    return store.read(0, store.n_rows), store.rows().documents


def random_dictionary(out: Path, variant=None, widths=(D,), d_sae: int = 40) -> Path:
    """Codes that differ much between tokens, some features dead, one always on."""
    generator = torch.Generator().manual_seed(len(widths))
    sae = build_sae(variant or ReluL1Settings(l1_coefficient=1.0), d_sae, list(widths)).eval().requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    sae.b_enc[::5] = -1e6
    sae.b_enc[1] = 1.0
    metadata: dict = {}
    save_sae(sae, out, metadata)
    return out


def with_weights(out: Path, W_enc, W_dec, b_dec) -> Path:
    sae = build_sae(ReluL1Settings(l1_coefficient=1.0), W_enc.shape[1], [D]).requires_grad_(False)
    sae.W_enc.copy_(W_enc)
    sae.W_dec.copy_(W_dec)
    sae.b_dec.copy_(b_dec)
    save_sae(sae, out, {})
    return out


def measured(folder, corpus, dictionary, sources=(NEOX,), n: int = SHARDS, **changes) -> list[dict]:
    """The rows of one dictionary's evaluation."""
    wanted = [Evaluated(dictionary, list(sources), "variant", 0)]
    models = [folder / model for model in {model for model, _ in sources}]
    out = dictionary.with_suffix(".json")
    evaluate(wanted, shards(folder, sources, n), models, corpus / "tokens", settings(**changes), RUN, out)
    return json.loads(out.read_text())["rows"]


class Reference:
    """A model run by transformers alone, one module's output replaced at kept tokens by a forward hook."""

    def __init__(self, folder, corpus, model: str, n_sequences: int = 20):
        self.sample = read_sample(corpus / "tokens", "evaluation", n_sequences, 3)
        self.tokens = torch.from_numpy(self.sample.tokens).long()
        self.kept = torch.from_numpy(self.sample.kept)
        self.hf = AutoModelForCausalLM.from_pretrained(folder / model).eval()
        self.labels = self.tokens.clone()
        self.labels[:, 1:][~self.kept[:, :-1]] = -100

    @torch.no_grad()
    def __call__(self, module: str = "", rows: torch.Tensor | None = None):
        """(mean loss, logits [B, L, V])."""

        def replace(_, inputs, out):
            value = (out[0] if isinstance(out, tuple) else out).clone()
            value[self.kept] = rows
            return (value, *out[1:]) if isinstance(out, tuple) else value

        handle = self.hf.get_submodule(module).register_forward_hook(replace) if rows is not None else None
        run = self.hf(self.tokens, labels=self.labels, use_cache=False)
        if handle:
            handle.remove()
        return float(run.loss), run.logits

    def check(self, row: dict, module: str, x_hat: torch.Tensor, x: torch.Tensor, all_x: torch.Tensor):
        """The row's losses, for reconstructions [n, d] of x [n, d] at kept tokens, with means over all stored rows."""
        clean, clean_logits = self()
        spliced, logits = self(module, x_hat)
        zero, mean = self(module, torch.zeros_like(x))[0], self(module, all_x.mean(0).expand_as(x))[0]
        p, q = (scores.log_softmax(-1)[:, :-1][self.kept[:, :-1]] for scores in (clean_logits, logits))
        kl = float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())
        expected = {"ce_clean": clean, "ce_spliced": spliced, "ce_zero": zero, "ce_mean": mean, "kl": kl}
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert row["predictions"] == int(self.kept[:, :-1].sum())
        assert min(abs(zero - clean), abs(mean - clean), abs(spliced - clean), kl) > 5e-5
        for name, without in (("loss_recovered", "ce_zero"), ("loss_recovered_from_mean", "ce_mean")):
            recovered = (row[without] - row["ce_spliced"]) / (row[without] - row["ce_clean"])
            assert row[name] == pytest.approx(recovered, rel=1e-9)


BLOCKS = {"gpt_neox": "gpt_neox.layers.0", "mamba": "backbone.layers.0"}


@pytest.mark.parametrize("source", [NEOX, MAMBA])
def test_metrics_are_those_of_plain_computations(folder, corpus, tmp_path, source):
    dictionary = random_dictionary(tmp_path / "sae")
    [row] = measured(folder, corpus, dictionary, [source])
    x, _ = stored(folder, source)
    sae = load_sae(dictionary)
    codes = sae.encode(x)
    x_hat = sae.decode(codes)
    frequency = (codes > 0).float().mean(0)
    expected = {
        "explained_variance": r2_score(x, x_hat, multioutput="variance_weighted"),
        "L0": float((codes > 0).sum(1).float().mean()),
        "mse": float((x - x_hat).square().mean()),
        "dead": float((frequency == 0).float().mean()),
        "dense": float((frequency > 0.1).float().mean()),
        "shrinkage": float(x_hat.square().sum() / (x_hat * x).sum()),
        "norm_ratio": float(x_hat.norm(dim=1).mean() / x.norm(dim=1).mean()),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert (row["live"], row["tokens"], row["d_sae"]) == (int((frequency > 0).sum()), len(x), 40)
    assert 0 < row["dead"] < 1
    counts, _ = np.histogram(np.log10(frequency[frequency > 0].numpy() - 1e-9), [*FREQUENCY_BINS, 0])
    assert row["frequency_counts"] == counts.tolist()
    place = {"model": source[0], "site": "resid_post.0", "variant": "variant", "seed": 0, "layer": 0, "kind": "sae"}
    assert row.items() >= (place | {"shared": None, "exclusive": None}).items()
    assert row.keys() == set(SCHEMA.names)
    reference = Reference(folder, corpus, source[0])
    n = reference.sample.n_rows
    reference.check(row, BLOCKS[source[0]], x_hat[:n], x[:n], x)


def test_a_perfect_dictionary_loses_nothing(folder, corpus, tmp_path):
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    [row] = measured(folder, corpus, with_weights(tmp_path / "sae", both.T, both, torch.zeros(D)))
    perfect = {
        "explained_variance": 1,
        "loss_recovered": 1,
        "kl": 0,
        "shrinkage": 1,
        "norm_ratio": 1,
        "L0": D,
        "mse": 0,
    }
    assert {name: row[name] for name in perfect} == pytest.approx(perfect, abs=1e-4)
    assert row["ce_spliced"] == pytest.approx(row["ce_clean"], abs=1e-5)


def test_a_dictionary_of_zeros_and_one_of_the_mean_recover_nothing(folder, corpus, tmp_path):
    nothing = torch.zeros(D, 4)
    [row] = measured(folder, corpus, with_weights(tmp_path / "zero", nothing, nothing.T, torch.zeros(D)))
    assert (row["loss_recovered"], row["shrinkage"], row["L0"], row["dead"], row["live"]) == (0, 0, 0, 1, 0)
    assert row["ce_spliced"] == row["ce_zero"]
    assert row["frequency_counts"] == [0] * len(FREQUENCY_BINS)
    mean = stored(folder, NEOX)[0].mean(0)
    [row] = measured(folder, corpus, with_weights(tmp_path / "mean", nothing, nothing.T, mean))
    assert (row["explained_variance"], row["loss_recovered_from_mean"]) == pytest.approx((0, 0), abs=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_measured_at_its_target(folder, corpus, tmp_path, skip):
    variant = TranscoderSettings(**AUX, input="resid_pre", target="mlp.out", skip=skip)
    dictionary = random_dictionary(tmp_path / "transcoder", variant, (D, D))
    sources = [("gpt_neox", "resid_pre.1"), ("gpt_neox", "mlp.1.out")]
    [row] = measured(folder, corpus, dictionary, sources)
    (x, _), (y, _) = (stored(folder, source) for source in sources)
    y_hat = load_sae(dictionary)(x)
    assert row["explained_variance"] == pytest.approx(r2_score(y, y_hat, multioutput="variance_weighted"), rel=1e-4)
    assert (row["kind"], row["site"], row["layer"]) == ("transcoder", "mlp.1.out", 1)
    reference = Reference(folder, corpus, "gpt_neox")
    n = reference.sample.n_rows
    reference.check(row, "gpt_neox.layers.1.mlp", y_hat[:n], y[:n], y)


def test_a_crosscoder_is_measured_at_each_site(folder, corpus, tmp_path):
    dictionary = random_dictionary(tmp_path / "pair", CrosscoderSettings(**AUX), (D, D), d_sae=60)
    sae = load_sae(dictionary)
    sae.W_dec[:20, :D] *= 0.05
    sae.W_dec[40:, D:] *= 0.01
    save_sae(sae, dictionary, {})
    rows = measured(folder, corpus, dictionary, [NEOX, MAMBA])
    values = [stored(folder, source)[0] for source in (NEOX, MAMBA)]
    codes = sae.encode(torch.cat(values, 1))
    x_hat = sae.decode(codes).split(D, dim=1)
    for row, x, part, (model, _) in zip(rows, values, x_hat, (NEOX, MAMBA), strict=True):
        assert (row["model"], row["kind"]) == (model, "crosscoder")
        assert row["L0"] == pytest.approx(float((codes > 0).sum(1).float().mean()))
        assert row["explained_variance"] == pytest.approx(r2_score(x, part, multioutput="variance_weighted"), rel=1e-4)
        reference = Reference(folder, corpus, model)
        n = reference.sample.n_rows
        reference.check(row, BLOCKS[model], part[:n], x[:n], x)
    table = read_table(tmp_path / "pair.features.parquet").to_pandas()
    assert list(table.columns) == ["feature", "frequency", "dead", *(f"share {m}:{s}" for m, s in (NEOX, MAMBA))]
    np.testing.assert_allclose(table.frequency, (codes > 0).float().mean(0), rtol=1e-6)
    norms = sae.W_dec.unflatten(1, (2, D)).norm(dim=2)
    np.testing.assert_allclose(table[table.columns[3:]], norms / norms.sum(1, keepdim=True), rtol=1e-5)
    live = table[~table.dead]
    for row, column in zip(rows, table.columns[3:], strict=True):
        assert row["shared"] == live[column].between(0.3, 0.7).sum() > 0
        assert row["exclusive"] == (live[column] > 0.9).sum() > 0


def test_intervals_are_those_of_resampled_documents(folder, corpus, tmp_path):
    dictionary = random_dictionary(tmp_path / "sae")
    [row] = measured(folder, corpus, dictionary, n=3)
    x, documents = stored(folder, NEOX, 3)
    sae = load_sae(dictionary)
    x_hat, active = sae(x), (sae.encode(x) > 0).sum(1).double()
    found: dict[str, list[float]] = {"explained_variance": [], "L0": []}
    unique = np.unique(documents)
    for counts in resample_weights(len(unique), 40, 1).astype(int):
        rows = np.concatenate([np.tile(np.flatnonzero(documents == d), n) for d, n in zip(unique, counts, strict=True)])
        rows = rows.astype(int)
        found["explained_variance"].append(r2_score(x[rows], x_hat[rows], multioutput="variance_weighted"))
        found["L0"].append(float(active[rows].mean()))
    for name, values in found.items():
        expected = np.quantile(values, [0.05, 0.95])
        assert [row[f"{name}_low"], row[f"{name}_high"]] == pytest.approx(expected, rel=1e-5)


def learned(folder: Path, corpus: Path, out: Path) -> Path:
    """The folder's GPT-NeoX after it has learned the text, so that setting its stream to zero costs much."""
    hf = AutoModelForCausalLM.from_pretrained(folder / "gpt_neox")
    tokens = torch.from_numpy(read_sample(corpus / "tokens", "train", 64, 0).tokens).long()
    optimiser = torch.optim.Adam(hf.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        hf(tokens, labels=tokens).loss.backward()
        optimiser.step()
    hf.save_pretrained(out / "gpt_neox")
    for shard in range(SHARDS):
        cache_shard(
            out / "gpt_neox", SITES[:1], corpus / "tokens", "evaluation", shard, HOW, out / "activations" / "gpt_neox"
        )
    return out


def test_intervals_hold_the_estimate_and_shrink_with_more_documents(folder, corpus, tmp_path):
    dictionary, folder = random_dictionary(tmp_path / "sae"), learned(folder, corpus, tmp_path / "learned")
    [few] = measured(folder, corpus, dictionary, n=1, sequences=6)
    [many] = measured(folder, corpus, dictionary, sequences=120)
    for name in ("explained_variance", "L0", "loss_recovered", "kl"):
        for row in (few, many):
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"], name
        widths = [row[f"{name}_high"] - row[f"{name}_low"] for row in (few, many)]
        assert widths[1] < widths[0], name


def test_the_bytes_are_the_same_and_blocks_make_no_difference(folder, corpus, tmp_path):
    dictionary = random_dictionary(tmp_path / "sae")
    [row] = measured(folder, corpus, dictionary)
    written = (tmp_path / "sae.json").read_bytes()
    measured(folder, corpus, dictionary)
    assert (tmp_path / "sae.json").read_bytes() == written
    [other] = measured(folder, corpus, dictionary, rows=7, batch_size=20)
    assert {k: v for k, v in other.items() if isinstance(v, float)} == pytest.approx(
        {k: v for k, v in row.items() if isinstance(v, float)}, rel=1e-4
    )


def test_dictionaries_measured_together_are_as_each_is_alone(folder, corpus, tmp_path):
    sources = [[("gpt_neox", "embed")], [NEOX], [NEOX]]
    folders = [random_dictionary(tmp_path / name) for name in ("a", "b")]
    folders.append(random_dictionary(tmp_path / "c", d_sae=50))
    wanted = [Evaluated(f, s, f.name, 0) for f, s in zip(folders, sources, strict=True)]
    used = shards(folder, [("gpt_neox", "embed"), NEOX])
    arguments = corpus / "tokens", settings(), RUN
    evaluate(wanted, used, [folder / "gpt_neox"], *arguments, tmp_path / "all.json")
    together = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert [(row["variant"], row["layer"]) for row in together] == [("a", None), ("b", 0), ("c", 0)]
    for one, row in zip(wanted, together, strict=True):
        evaluate([one], shards(folder, one.sources), [folder / "gpt_neox"], *arguments, tmp_path / "one.json")
        assert json.loads((tmp_path / "one.json").read_text())["rows"] == [row]


def test_what_does_not_fit_is_one_clear_error(folder, corpus, tmp_path):
    wide, good = random_dictionary(tmp_path / "wide", widths=(D + 1,)), random_dictionary(tmp_path / "good")
    pair = random_dictionary(tmp_path / "pair", CrosscoderSettings(**AUX), (D, D))
    with pytest.raises(
        StudyError, match=r"/wide: is of width 17, but gpt_neox resid_post\.0 has width 16 in .*shard_0"
    ):
        measured(folder, corpus, wide)
    with pytest.raises(StudyError, match=r"/pair: is a crosscoder of 2 sites, but its sources are gpt_neox:resid_post"):
        measured(folder, corpus, pair)
    used, models = shards(folder, [NEOX]), [folder / "gpt_neox"]
    one, out = Evaluated(good, [NEOX], "topk", 0), tmp_path / "out.json"
    both = Evaluated(pair, [NEOX, MAMBA], "pair", 0)
    other_seed = RUN.model_copy(update={"sample_seed": 4})
    for wanted, given, folders, run, message in (
        (
            [one],
            used,
            models,
            other_seed,
            "evaluation sequences by sample_seed=4 are not those that the shards of gpt_ne",
        ),
        ([one], used, [folder / "mamba"], RUN, "--model: no folder of the model 'gpt_neox' was given"),
        (
            [one],
            shards(folder, [MAMBA]),
            models,
            RUN,
            "is of mamba:resid_post.0, which is no source: gpt_neox:resid_pos",
        ),
        ([both], used, models, RUN, "--activations: no shard of mamba:resid_post.0 was given"),
        ([one, both], used, models, RUN, "a crosscoder is evaluated alone"),
    ):
        with pytest.raises(StudyError, match=message):
            evaluate(wanted, given, folders, corpus / "tokens", settings(), run, out)
    assert not out.exists()


def test_a_site_without_variance_is_named(tmp_path):
    placed = place(Evaluated(random_dictionary(tmp_path / "sae"), [("m", "resid_post.0")], "topk", 0))
    store = ActivationStore(write_store(tmp_path / "store", torch.full((50, D), 0.1), [50], split="evaluation"))
    with pytest.raises(StudyError, match=r"m resid_post\.0: is the same at every token"):
        StoredSums.over(placed, {("m", "resid_post.0"): store}, 7)


def test_frequencies_fall_into_bins_of_half_a_decade():
    frequency = np.array([0, 1e-8, 2e-6, 1e-3, 0.2, 0.32, 1.0])
    assert frequency_counts(frequency) == [2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2]


def test_gather_puts_all_rows_in_one_order(folder, corpus, tmp_path):
    rows = measured(
        folder, corpus, random_dictionary(tmp_path / "pair", CrosscoderSettings(**AUX), (D, D)), [NEOX, MAMBA]
    )
    rows += measured(folder, corpus, random_dictionary(tmp_path / "sae"))
    changed = [
        rows[2] | change for change in ({"layer": 10}, {"layer": 2}, {"layer": None}, {"seed": 1}, {"variant": "a"})
    ]
    write_json(tmp_path / "one.json", {"rows": [*changed, rows[0]]})
    write_json(tmp_path / "two.json", {"rows": rows[1:]})
    for order in (["one", "two"], ["two", "one"]):
        gather([tmp_path / f"{name}.json" for name in order], tmp_path / f"{order[0]}.parquet")
    table = read_table(tmp_path / "one.parquet")
    assert table.schema.equals(SCHEMA)
    found = [tuple(row[name] for name in ("model", "variant", "seed", "layer")) for row in table.to_pylist()]
    neox = [
        ("a", 0, 0),
        ("variant", 0, None),
        ("variant", 0, 0),
        ("variant", 0, 0),
        ("variant", 0, 2),
        ("variant", 0, 10),
    ]
    assert found == [("gpt_neox", *key) for key in [*neox, ("variant", 1, 0)]] + [("mamba", "variant", 0, 0)]
    assert table["shared"].null_count == 6
    write_json(tmp_path / "foreign.json", {"rows": [{"model": "m"}]})
    with pytest.raises(StudyError, match=r"foreign\.json: is no evaluation with the columns model, site"):
        gather([tmp_path / "one.json", tmp_path / "foreign.json"], tmp_path / "out.parquet")
