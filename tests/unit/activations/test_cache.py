import json
import math

import numpy as np
import pytest
import torch

from tests.conftest import LENGTH, tiny_model, tiny_settings
from universality.activations.cache import cache_shard, kept_values, row_shape
from universality.activations.sample import read_sample
from universality.activations.settings import ShardSettings
from universality.activations.sites import neuron_sites, residual_site, site_width
from universality.activations.store import ActivationStore, check_aligned, stores_by_site
from universality.activations.verify import verify_shard
from universality.corpus.tokenizer import identity, load_tokenizer
from universality.corpus.tokens import read_tokens
from universality.errors import StudyError
from universality.models.language_model import FAMILIES
from universality.models.settings import TrainingSettings
from universality.models.training import train_model
from universality.storage import read_table


def settings(**changes) -> ShardSettings:
    values = {
        "sample_seed": 3,
        "shard_sequences": 10,
        "batch_size": 4,
        "products": "float32",
        "device": "cpu",
        "dtype": "fp32",
    }
    return ShardSettings(**values | changes)


def sites_of(family: str) -> list[str]:
    return [residual_site(n) for n in (0, 1)] + [site for n in (0, 1) for site in neuron_sites(family, n)]


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """Evaluation shards 0 and 1 of all sites of both families' tiny models."""
    out = tmp_path_factory.mktemp("activations")
    for family in FAMILIES:
        model = tiny_model(family, vocab_size=300)
        model.hf.save_pretrained(out / family)
        for shard in range(2):
            cache_shard(
                out / family, sites_of(family), corpus / "tokens", "evaluation", shard, settings(), out / "a" / family
            )
    return out


def shards(folder, family, site="resid_post.0", part="a"):
    return sorted((folder / part / family / site / "evaluation").iterdir())


def test_sites_known_by_name_are_those_of_the_families(family):
    model = tiny_model(family, vocab_size=300)
    for layer in range(model.n_layers):
        for site in [residual_site(layer), *neuron_sites(family, layer)]:
            assert math.prod(row_shape(model, family, site)) == site_width(family, site, model.d_model)


def test_cached_values_are_what_the_model_computes(corpus, folder, family):
    sample = read_sample(corpus / "tokens", "evaluation", 20, 3)
    tokens = torch.from_numpy(sample.tokens).long()
    model = tiny_model(family, vocab_size=300)
    expected = model.run(tokens, capture=sites_of(family)).captured
    stores = stores_by_site(
        [path for site in sites_of(family) for path in shards(folder, family, site)], model=family, split="evaluation"
    )
    assert list(stores) == sites_of(family)
    for site, store in stores.items():
        values = store.read(0, store.n_rows)
        torch.testing.assert_close(values, expected[site][sample.kept], rtol=1e-4, atol=1e-4)
        rows = store.rows()
        assert np.array_equal(rows.tokens, sample.tokens[sample.kept])
        assert np.array_equal(rows.documents, sample.documents[sample.kept])
        assert (rows.positions.min(), rows.positions.max()) == (1, LENGTH - 1)
        assert np.array_equal(rows.starts, sample.starts[sample.kept])
        assert np.array_equal(rows.ends, sample.ends[sample.kept])


def test_the_manifest_tells_what_a_shard_is_and_where_it_stands(corpus, folder):
    first, second = (json.loads((s / "manifest.json").read_text()) for s in shards(folder, "mamba", "mamba.1.gate"))
    sample = read_sample(corpus / "tokens", "evaluation", 20, 3)
    assert (second["model"], second["site"], second["split"]) == ("mamba", "mamba.1.gate", "evaluation")
    assert (first["first_row"], first["first_sequence"]) == (0, 0)
    assert (second["first_row"], second["first_sequence"], second["sequences"]) == (sample.kept[:10].sum(), 10, 10)
    assert second["shape"] == [sample.kept[10:].sum(), 32]
    assert second["tokenizer"] == sample.tokenizer


def test_values_are_a_plain_safetensors_file(folder):
    from safetensors.torch import load_file

    for shard in shards(folder, "gpt_neox", "mlp.0.post"):
        store = ActivationStore([shard])
        tensors = load_file(shard / "values.safetensors")
        assert list(tensors) == ["values"]
        assert torch.equal(tensors["values"], store.read(0, store.n_rows))


def test_one_job_or_many_the_rows_are_the_same(corpus, folder, tmp_path, family):
    for number in range(4):
        out = tmp_path / "b" / family
        cache_shard(
            folder / family, sites_of(family), corpus / "tokens", "evaluation", number,
            settings(shard_sequences=5, batch_size=5), out,
        )  # fmt: skip
    coarse = ActivationStore(shards(folder, family))
    fine = ActivationStore(shards(tmp_path, family, part="b"))
    assert np.array_equal(coarse.rows(), fine.rows())
    torch.testing.assert_close(coarse.read(0, 10**9), fine.read(0, 10**9), rtol=1e-4, atol=1e-5)


def test_the_same_job_writes_the_same_bytes(corpus, folder, tmp_path):
    model, sites, out = folder / "mamba", sites_of("mamba"), tmp_path / "again"
    cache_shard(model, sites, corpus / "tokens", "evaluation", 1, settings(), out)
    again = tmp_path / "again" / "resid_post.1" / "evaluation" / "shard_1"
    for path in shards(folder, "mamba", "resid_post.1")[1].iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_bf16_halves_the_bytes_and_keeps_eight_bits(corpus, folder, tmp_path):
    model, out = folder / "gpt_neox", tmp_path / "c" / "gpt_neox"
    cache_shard(model, ["resid_post.0"], corpus / "tokens", "evaluation", 0, settings(dtype="bf16"), out)
    exact, rounded = shards(folder, "gpt_neox")[0], shards(tmp_path, "gpt_neox", part="c")[0]
    values = ActivationStore([exact]).read(0, 10**9)
    assert torch.equal(ActivationStore([rounded]).read(0, 10**9), values.bfloat16().float())
    sizes = [(shard / "values.safetensors").stat().st_size for shard in (exact, rounded)]
    assert sizes[1] < 0.6 * sizes[0]
    verify_shard(rounded)


def test_shards_part_one_endless_sample(corpus):
    whole = read_sample(corpus / "tokens", "train", 30, 3)
    assert np.array_equal(read_sample(corpus / "tokens", "train", 20, 3).tokens, whole.tokens[:20])
    assert not np.array_equal(read_sample(corpus / "tokens", "train", 30, 4).tokens, whole.tokens)
    assert len(np.unique(whole.documents)) > 20


def test_asking_for_more_than_the_corpus_has_is_an_error(corpus):
    with pytest.raises(StudyError, match=r"activations\.train_sequences: 100000 sequences are asked for, more"):
        read_sample(corpus / "tokens", "train", 100_000, 3)
    message = r"activations\.evaluation_sequences: 100000 .* that the other split has"
    with pytest.raises(StudyError, match=message):
        read_sample(corpus / "tokens", "other", 100_000, 3)


def test_a_model_with_its_own_tokenizer_is_told_of_the_same_text(corpus, tmp_path):
    """From tokens to a trained model to its activations on another corpus, beside a model of the study's tokenizer."""
    training = TrainingSettings(
        repeat_fraction=0.5, uniform_fraction=0.5, shuffled_fraction=0.5, min_segment=2, min_induction_gain=-9.0,
        warmup_fraction=0.2, decay_fraction=0.2, weight_decay=0.1, evaluation_sequences=8, checkpoint_steps=6,
    )  # fmt: skip
    lengths = read_table(corpus / "documents.parquet", ["characters"])["characters"].to_pylist()
    shard_of, covered = {}, {}
    for name, place in {
        "own": ("other_tokenizers/small", "other_tokens/small"),
        "shared": ("tokenizer", "tokens"),
    }.items():
        tokenizer, tokens = (corpus / part for part in place)
        train_model(
            name, tiny_settings("gpt_neox"), training, tokens, tokenizer, tmp_path / "state", tmp_path / name
        )  # fmt: skip
        assert identity(load_tokenizer(tmp_path / name)) == identity(load_tokenizer(tokenizer))
        whole = settings(shard_sequences=len(read_tokens(tokens, "other").tokens))
        cache_shard(tmp_path / name, ["resid_post.1"], tokens, "other", 0, whole, tmp_path / "a" / name)
        [shard_of[name]] = (tmp_path / "a" / name / "resid_post.1" / "other").iterdir()
        rows = ActivationStore([shard_of[name]], model=name, split="other").rows()
        places = zip(rows.documents.tolist(), rows.starts.tolist(), rows.ends.tolist(), strict=True)
        covered[name] = {(row, character) for row, start, end in places for character in range(start, end)}
    documents = {row for row, _ in covered["own"]}
    everything = {(row, character) for row in documents for character in range(lengths[row])}
    assert {row for row, _ in covered["shared"]} == documents
    for characters in covered.values():
        assert characters <= everything
        assert len(everything - characters) < LENGTH  # the rest that does not fill a sequence
    with pytest.raises(StudyError, match="different tokenizers"):
        check_aligned([shard_of["own"]], [shard_of["shared"]])


def test_shards_of_other_tokens_are_not_joined(folder):
    a, b = shards(folder, "gpt_neox"), shards(folder, "mamba", "mamba.0.gate")
    check_aligned(a, b)
    with pytest.raises(StudyError, match="different tokens"):
        check_aligned(a, b[::-1])
    with pytest.raises(StudyError, match="2 and 1 shards"):
        check_aligned(a, b[:1])


def test_values_that_are_not_finite_are_refused_and_nothing_is_left(corpus, tmp_path):
    """Beyond a few tokens, on which models are checked when they are loaded."""
    model = tiny_model("gpt_neox", vocab_size=300)
    tokens = read_sample(corpus / "tokens", "train", 10, 3).tokens
    model.hf.gpt_neox.embed_in.weight[int(tokens[-1, -1])] = 3e38
    model.hf.save_pretrained(tmp_path / "model")
    with pytest.raises(StudyError, match=r"resid_post\.0 has values that are not finite|logits are not finite"):
        cache_shard(
            tmp_path / "model", ["resid_post.0", "resid_post.1"], corpus / "tokens", "train", 0, settings(),
            tmp_path / "out",
        )  # fmt: skip
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file() or "shard" in path.name] == []


def test_kept_values_are_finite_however_large(tmp_path):
    kept = np.array([[False, True, True]])
    large = torch.full((1, 3, 2), 3e38)
    assert torch.equal(kept_values("m", "s", large, kept, torch.float32), large[0, 1:])
    for bad in (math.inf, -math.inf, math.nan):
        value = torch.zeros(1, 3, 2)
        value[0, 0] = bad  # of a token that is not kept
        kept_values("m", "s", value, kept, torch.float32)
        value[0, 2, 1] = bad
        with pytest.raises(StudyError, match="m: s has values that are not finite"):
            kept_values("m", "s", value, kept, torch.bfloat16)


def test_a_site_without_a_value_for_each_token_is_refused(corpus, folder, tmp_path):
    site = next(s for s, shape in tiny_model("mamba", vocab_size=300).sites.items() if shape[:2] != ("B", "L"))
    with pytest.raises(StudyError, match=r"mamba: mamba\.0\.\S+ has shape .* not one value a token"):
        cache_shard(folder / "mamba", [site], corpus / "tokens", "train", 0, settings(), tmp_path / "out")


def test_a_site_that_the_model_lacks_is_named(corpus, folder, tmp_path):
    with pytest.raises(StudyError, match=r"gpt_neox: has no site 'resid_post\.7'; it has embed"):
        cache_shard(folder / "gpt_neox", ["resid_post.7"], corpus / "tokens", "train", 0, settings(), tmp_path / "out")


def test_products_in_bfloat16_are_told_apart_and_their_error_is_kept(corpus, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("universality.models.loading.has_bf16_products", lambda device: True)  # torch emulates them
    site = ["resid_post.1"]
    rounded = settings(products="bfloat16")
    cache_shard(folder / "mamba", site, corpus / "tokens", "evaluation", 0, rounded, tmp_path / "mamba")
    path = tmp_path / "mamba" / site[0] / "evaluation" / "shard_0"
    manifest = verify_shard(path)
    assert manifest.products == "bfloat16"
    assert 1e-6 < manifest.product_error < 0.03
    exact = shards(folder, "mamba", site[0])
    ours, theirs = (ActivationStore([p]).read(0, 10**6) for p in (path, exact[0]))
    assert 1e-6 < float((ours - theirs).norm() / theirs.norm()) < 0.03
    with pytest.raises(StudyError, match="is of products 'float32', but .* is of 'bfloat16'"):
        ActivationStore([path, exact[1]])
