import shutil

import numpy as np
import pytest
import torch

from tests.conftest import LENGTH, tiny_model
from universality.activations.cache import cache_shard, sample_rows
from universality.activations.settings import CacheSettings
from universality.activations.store import check_aligned, read_rows, read_site, sites_in
from universality.corpus.tokens import read_tokens
from universality.errors import StudyError


def settings(**changes) -> CacheSettings:
    values = {"sample_seed": 3, "shard_sequences": 10, "batch_size": 4, "dtype": "float32"}
    return CacheSettings(**values | changes)


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    """Evaluation shards of both families' tiny models: family -> [shard_0, shard_1]."""
    out = tmp_path_factory.mktemp("activations")
    shards = {}
    for family in ("gpt_neox", "mamba"):
        model = tiny_model(family, vocab_size=300)
        model.hf.save_pretrained(out / family)
        shards[family] = [out / f"{family}_shard_{n}" for n in range(2)]
        for number, shard in enumerate(shards[family]):
            cache_shard(out / family, [0, 1], corpus / "tokens", "evaluation", number, settings(), shard)
    return shards


@pytest.mark.parametrize("family", ["gpt_neox", "mamba"])
def test_cached_values_are_what_the_model_computes(corpus, folders, family):
    sequences = read_tokens(corpus / "tokens", "evaluation")
    rows = np.concatenate([sample_rows(sequences, "evaluation", n, settings()) for n in range(2)])
    tokens = torch.from_numpy(sequences.tokens[rows]).long()
    model = tiny_model(family, vocab_size=300)
    kept = tokens != sequences.end_of_text
    neurons = [site for n in (0, 1) for site in model.family.in_layer(model.family.neurons, n)]
    assert sites_in(folders[family][0]) == sorted(["resid_post.0", "resid_post.1", *neurons])
    expected = model.run(tokens, capture=[*neurons, "resid_post.0", "resid_post.1"]).captured
    for site in sites_in(folders[family][0]):
        torch.testing.assert_close(read_site(folders[family], site), expected[site][kept], rtol=1e-4, atol=1e-4)
    described = read_rows(folders[family])
    assert np.array_equal(described.tokens, tokens[kept])
    assert np.array_equal(described.documents, sequences.documents[rows][kept.numpy()])
    assert described.positions.min() >= 1
    assert described.positions.max() == LENGTH - 1


def test_shards_part_one_endless_sample(corpus):
    sequences = read_tokens(corpus / "tokens", "train")
    parts = [sample_rows(sequences, "train", n, settings()) for n in range(3)]
    assert len(np.unique(np.concatenate(parts))) == 30
    assert np.array_equal(np.concatenate(parts), sample_rows(sequences, "train", 0, settings(shard_sequences=30)))


def test_asking_for_more_than_the_corpus_has_is_an_error(corpus):
    sequences = read_tokens(corpus / "tokens", "train")
    with pytest.raises(StudyError, match=r"activations\.train_sequences: shard 9999 would need sequences up to 100000"):
        sample_rows(sequences, "train", 9999, settings())


def test_bfloat16_halves_the_bytes_and_keeps_eight_bits(corpus, folders, tmp_path):
    model = folders["gpt_neox"][0].parent / "gpt_neox"
    cache_shard(model, [0], corpus / "tokens", "evaluation", 0, settings(dtype="bfloat16"), tmp_path / "shard")
    exact, rounded = (read_site([f], "resid_post.0") for f in (folders["gpt_neox"][0], tmp_path / "shard"))
    torch.testing.assert_close(rounded, exact, rtol=2**-8, atol=1e-6)
    sizes = [(f / "resid_post.0.safetensors").stat().st_size for f in (folders["gpt_neox"][0], tmp_path / "shard")]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_truncated_shard_a_foreign_site_and_a_missing_one_are_named(folders, tmp_path):
    broken = tmp_path / "shard"
    shutil.copytree(folders["mamba"][0], broken)
    path = broken / "resid_post.1.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StudyError, match=r"resid_post\.1\.safetensors: truncated or damaged"):
        read_site([broken], "resid_post.1")
    shutil.copy(folders["mamba"][1] / path.name, path)
    with pytest.raises(StudyError, match=r"resid_post\.1\.safetensors: .*manifest"):
        read_site([broken], "resid_post.1")
    with pytest.raises(StudyError, match=r"holds no site 'resid_post\.9'; it holds mamba\.0\.gate"):
        read_site([broken], "resid_post.9")
    (broken / "manifest.json").unlink()
    with pytest.raises(StudyError, match=r"manifest\.json"):
        read_site([broken], "resid_post.0")


def test_shards_of_other_tokens_are_not_joined(folders):
    check_aligned(folders["gpt_neox"], folders["mamba"])
    with pytest.raises(StudyError, match="different tokens"):
        check_aligned(folders["gpt_neox"], folders["mamba"][::-1])


def test_values_that_are_not_finite_are_refused(corpus, tmp_path):
    model = tiny_model("gpt_neox", vocab_size=300)
    model.hf.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.mul_(1e38).mul_(1e3).clamp_(-3e38, 3e38)
    model.hf.save_pretrained(tmp_path / "model")
    with pytest.raises(StudyError, match="model: gpt_neox: its logits are not finite"):
        cache_shard(tmp_path / "model", [0, 1], corpus / "tokens", "train", 0, settings(), tmp_path / "shard")
    assert not (tmp_path / "shard").exists()
