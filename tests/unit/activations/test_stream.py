import itertools
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch

from tests.conftest import LENGTH, small_training, tiny_model
from universality.activations.batches import StoredBatches
from universality.activations.cache import cache_shard
from universality.activations.settings import ShardSettings, StreamSettings
from universality.activations.store import ActivationStore
from universality.activations.stream import StreamedBatches
from universality.errors import StudyError
from universality.models.language_model import FAMILIES
from universality.saes.settings import CrosscoderSettings, TopKSettings
from universality.saes.sources import open_batches
from universality.saes.training import Wanted, train_saes

SITE = "resid_post.1"


def settings(**changes) -> StreamSettings:
    values = {
        "sample_seed": 3,
        "sequences": 20,
        "batch_size": 4,
        "products": "float32",
        "device": "cpu",
        "dtype": "fp32",
        "buffer_rows": 7 * (LENGTH - 1),
    }
    return StreamSettings(**values | changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_model(family, vocab_size=300).hf.save_pretrained(folder / family)
    return folder


def taken(batches, size, count, seed=0, start=0) -> torch.Tensor:
    with closing(batches.batches(size, seed, start)) as found:
        return torch.stack(list(itertools.islice(found, count)))


def test_an_epoch_of_a_stream_has_the_rows_of_the_store(corpus, models, tmp_path, family):
    shard = ShardSettings(
        sample_seed=3, shard_sequences=20, batch_size=4, products="float32", device="cpu", dtype="fp32"
    )
    cache_shard(models / family, [SITE], corpus / "tokens", "train", 0, shard, tmp_path)
    store = StoredBatches(ActivationStore([tmp_path / SITE / "train" / "shard_0"]))
    stream = StreamedBatches(models / family, corpus / "tokens", SITE, settings())
    assert (stream.n_rows, stream.d_in, stream.model, stream.site) == (store.n_rows, store.d_in, family, SITE)
    epochs = taken(stream, 1, 2 * stream.n_rows).reshape(2, stream.n_rows, -1)
    stored = taken(store, 1, store.n_rows).flatten(0, 1)
    for epoch in epochs:
        # Other sequences beside a sequence can change last digits, so rows are paired by distance, one to one.
        distance = torch.cdist(epoch, stored, compute_mode="donot_use_mm_for_euclid_dist").numpy()
        pairs = scipy.optimize.linear_sum_assignment(distance)
        assert distance[pairs].max() < 1e-3 * float(stored.norm(dim=1).mean())
    assert not torch.equal(epochs[0], epochs[1])


def test_a_stream_rounds_as_the_store_does(corpus, models):
    rows = taken(StreamedBatches(models / "mamba", corpus / "tokens", SITE, settings(dtype="bf16")), 8, 4)
    assert torch.equal(rows, rows.bfloat16().float())


@pytest.mark.parametrize("size", [1, 10, 64])
def test_a_stream_goes_on_at_any_step_with_the_same_batches(corpus, models, size):
    def stream():
        return StreamedBatches(models / "gpt_neox", corpus / "tokens", SITE, settings())

    count = 2 * stream().n_rows // size + 3
    whole = taken(stream(), size, count, seed=5)
    assert torch.equal(whole, taken(stream(), size, count, seed=5))
    for start in (1, count // 3, count - 2):
        assert torch.equal(taken(stream(), size, count - start, seed=5, start=start), whole[start:])
    assert not torch.equal(whole[0], taken(stream(), size, 1, seed=6)[0])


def test_a_buffer_is_shuffled_whole(corpus, models):
    """Rows of one sequence, which the sample has side by side, come far apart."""
    stream = StreamedBatches(models / "gpt_neox", corpus / "tokens", SITE, settings(buffer_rows=10**6))
    in_order = torch.cat(list(stream._values(np.arange(20))))
    places = torch.cdist(taken(stream, 1, stream.n_rows).flatten(0, 1), in_order).argmin(1).argsort()
    distance = (places[1:] - places[:-1]).abs().float().mean()
    assert abs(float(distance) - stream.n_rows / 3) < stream.n_rows / 10


def test_statistics_are_those_of_the_first_buffer_of_the_sample(corpus, models):
    stream = StreamedBatches(models / "mamba", corpus / "tokens", SITE, settings())
    first = torch.cat(list(stream._values(np.arange(7)))).double().numpy()
    found = stream.statistics()
    assert found.n_rows == len(first)
    np.testing.assert_allclose(found.mean, first.mean(0), rtol=1e-12)
    assert found.variance == pytest.approx(first.var(0).sum(), rel=1e-12)
    assert found.mean_norm == pytest.approx(np.linalg.norm(first, axis=1).mean(), rel=1e-12)


def test_dictionaries_are_trained_on_a_stream_to_the_same_bytes(corpus, models, tmp_path):
    """Two from one pass over one site, and a crosscoder over two models that run side by side."""
    crosscoder = CrosscoderSettings(k=3, k_aux=8, aux_coefficient=0.03125)
    training = small_training(d_sae=24, batch_size=32, steps=60, dead_steps=20)
    for name in ("one", "two"):
        out = tmp_path / name
        folders = [models / "mamba", models / "gpt_neox"]
        single = open_batches([f"mamba:{SITE}"], [], folders[:1], corpus / "tokens", settings())
        joined = open_batches([f"{f.name}:{SITE}" for f in folders], [], folders, corpus / "tokens", settings())
        assert joined.d_in == 2 * single.d_in
        topk = TopKSettings(k=3, k_aux=8, aux_coefficient=0.03125)
        train_saes(single, [Wanted(topk, seed, out / f"seed_{seed}") for seed in (0, 1)], training, tmp_path / "state")
        train_saes(joined, [Wanted(crosscoder, 0, out / "crosscoder")], training, tmp_path / "state")
    for path in sorted((tmp_path / "one").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_another_site_is_other_data(corpus, models):
    one, same, other = (
        StreamedBatches(models / "mamba", corpus / "tokens", site, settings()).identity()
        for site in (SITE, SITE, "resid_post.0")
    )
    assert one == same != other


def test_options_that_do_not_fit_together_are_refused(corpus, models):
    shards, model, tokens = [Path("shard_0")], models / "mamba", Path("tokens")
    for shard_list, folders, tokens_folder, stream in (
        ([], [], None, None),
        (shards, [model], tokens, None),
        (shards, [], None, settings()),
        ([], [model], None, settings()),
        ([], [model], tokens, None),
    ):
        with pytest.raises(StudyError, match="needs either --activations, or --stream-model, --tokens and settings"):
            open_batches([f"mamba:{SITE}"], shard_list, folders, tokens_folder, stream)
    with pytest.raises(StudyError, match=r"--stream-model: no folder of the model 'gpt_neox' was given"):
        open_batches([f"gpt_neox:{SITE}"], [], [model], tokens, settings())
    with pytest.raises(StudyError, match=r"--source: 'mamba' is not MODEL:SITE"):
        open_batches(["mamba"], shards, [], None, None)


def test_what_goes_wrong_in_the_model_is_raised_by_the_reader(corpus, tmp_path):
    tiny_model("gpt_neox", vocab_size=300).hf.save_pretrained(tmp_path / "broken")
    stream = StreamedBatches(tmp_path / "broken", corpus / "tokens", SITE, settings())
    stream._model.hf.gpt_neox.layers[1].mlp.dense_4h_to_h.bias[0] = float("nan")
    with pytest.raises(StudyError, match=r"broken: resid_post\.1 has values that are not finite"):
        taken(stream, 4, 1)
    with pytest.raises(StudyError, match=r"broken: has no site 'resid_post\.2'"):
        StreamedBatches(tmp_path / "broken", corpus / "tokens", "resid_post.2", settings())
    with pytest.raises(StudyError, match=r"activations\.train_sequences: 100000 sequences are asked for"):
        StreamedBatches(tmp_path / "broken", corpus / "tokens", SITE, settings(sequences=100_000))
