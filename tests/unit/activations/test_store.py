import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import write_store
from universality.activations.store import ActivationStore, check_aligned
from universality.activations.verify import verify_shard
from universality.errors import StudyError

N_ROWS, WIDTH = 300, 6
VALUES = torch.randn(N_ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of ten rows of float32."""
    monkeypatch.setattr("universality.activations.writer.BLOCK_BYTES", 10 * WIDTH * 4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_any_split_into_shards_gives_the_same_rows(tmp_path, dtype):
    rng = np.random.default_rng(1)
    expected = VALUES if dtype == "fp32" else VALUES.bfloat16().float()
    order = rng.permutation(N_ROWS)[:77]
    for number in range(25):
        cuts = np.sort(rng.choice(np.arange(1, N_ROWS), size=rng.integers(0, 12), replace=False))
        sizes = np.diff([0, *cuts, N_ROWS]).tolist()
        store = ActivationStore(write_store(tmp_path / str(number), VALUES, sizes, dtype))
        assert (store.n_rows, store.d_in, store.shape) == (N_ROWS, WIDTH, (WIDTH,))
        assert torch.equal(store.read(0, N_ROWS), expected)
        start, stop = np.sort(rng.integers(0, N_ROWS + 1, 2))
        assert torch.equal(store.read(start, stop), expected[start:stop])
        assert torch.equal(torch.cat(list(store.blocks(int(rng.integers(1, 90))))), expected)
        assert torch.equal(store.gather(order).float(), expected[order])
        assert np.array_equal(store.rows().tokens, np.arange(N_ROWS))


def test_rows_of_any_shape(tmp_path):
    values = VALUES.reshape(N_ROWS, 2, 3)
    store = ActivationStore(write_store(tmp_path, values, [100, 200]))
    assert store.shape == (2, 3)
    assert torch.equal(store.read(90, 110), values[90:110])
    assert torch.equal(store.gather(np.array([5, 120])), values[[5, 120]].flatten(1))


def edit_manifest(shard, **changes):
    path = shard / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_truncated_shard_is_refused_at_opening(tmp_path):
    [shard] = write_store(tmp_path, VALUES, [N_ROWS])
    path = shard / "values.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole[:50], whole[:4], b"", b"\xff" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(StudyError, match=r"shard_0/values\.safetensors: truncated or damaged"):
            ActivationStore([shard])
    path.unlink()
    with pytest.raises(StudyError, match=r"shard_0/values\.safetensors"):
        ActivationStore([shard])


def test_values_of_another_shape_or_dtype_than_the_manifest_says(tmp_path):
    [shard] = write_store(tmp_path / "a", VALUES, [N_ROWS])
    [other] = write_store(tmp_path / "b", VALUES, [N_ROWS], "bf16")
    shutil.copy(other / "values.safetensors", shard / "values.safetensors")
    with pytest.raises(StudyError, match=r"shard_0/values\.safetensors: holds BF16 .* manifest says F32"):
        ActivationStore([shard])


def test_rows_that_are_not_the_shards_own(tmp_path):
    first, second = write_store(tmp_path, VALUES, [150, 150])
    shutil.copy(second / "rows.safetensors", first / "rows.safetensors")
    with pytest.raises(StudyError, match=r"shard_0/rows\.safetensors: is missing or not the file that its manifest"):
        ActivationStore([first])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 0}, r"shard_1/manifest\.json: is of format 0, not of format 2"),
        ({"rows": "many"}, r"shard_1/manifest\.json: rows: 'many' is not allowed"),
        ({"rows": 7}, r"shard_1/manifest\.json: shape: \[150, 6\] does not begin with rows=7"),
        ({"block_crc32": [1]}, r"shard_1/manifest\.json: block_crc32: 1 checksums for 15 blocks"),
        ({"model": "n"}, r"shard_1/manifest\.json: is of model 'n', but .*shard_0 is of 'm'"),
        ({"site": "resid_post.1"}, r"manifest\.json: is of site 'resid_post\.1', but .*shard_0 is of 'resid_post\.0'"),
        ({"split": "evaluation"}, "manifest.json: is of split 'evaluation'"),
        ({"tokenizer": "u"}, "manifest.json: is of tokenizer 'u'"),
        ({"sample_seed": 9}, "manifest.json: is of sample_seed 9"),
        ({"first_row": 151}, r"manifest\.json: starts at row 151, but .*shard_0 ends before 150: a gap"),
        ({"first_row": 149}, "starts at row 149, but .* ends before 150: an overlap"),
        ({"first_sequence": 2}, "starts at sequence 2, but .* ends before 1: a gap"),
    ],
)
def test_a_foreign_shard_is_refused_at_opening(tmp_path, changes, message):
    shards = write_store(tmp_path, VALUES, [150, 150])
    ActivationStore(shards)
    edit_manifest(shards[1], **changes)
    with pytest.raises(StudyError, match=message) as caught:
        ActivationStore(shards)
    assert "\n" not in str(caught.value)


def test_neighbours_of_another_width_or_dtype(tmp_path):
    [first, _] = write_store(tmp_path / "a", VALUES, [150, 150])
    [_, narrow] = write_store(tmp_path / "b", VALUES[:, :4], [150, 150])
    [_, rounded] = write_store(tmp_path / "c", VALUES, [150, 150], "bf16")
    with pytest.raises(StudyError, match=r"shard_1/manifest\.json: has rows of shape \[4\], but .*shard_0 of \[6\]"):
        ActivationStore([first, narrow])
    with pytest.raises(StudyError, match=r"c/shard_1/manifest\.json: is of dtype 'bf16'"):
        ActivationStore([first, rounded])


def test_a_store_of_something_else_than_asked(tmp_path):
    shards = write_store(tmp_path, VALUES, [N_ROWS])
    for asked in ({"model": "n"}, {"site": "resid_post.1"}, {"split": "evaluation"}):
        [(key, value)] = asked.items()
        with pytest.raises(StudyError, match=rf"manifest\.json: is of {key} '.*', but '{value}' is asked for"):
            ActivationStore(shards, **asked)
    with pytest.raises(StudyError, match="no shard"):
        ActivationStore([])
    (shards[0] / "manifest.json").unlink()
    with pytest.raises(StudyError, match=r"shard_0/manifest\.json: not a readable JSON file"):
        ActivationStore(shards)


def damage(shard, row):
    path = shard / "values.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) - (150 - row) * WIDTH * 4] ^= 1
    path.write_bytes(bytes(data))


def test_a_damaged_block_is_found_when_it_is_read_and_not_before(tmp_path):
    shards = write_store(tmp_path, VALUES, [150, 150])
    damage(shards[1], 42)
    message = r"shard_1/values\.safetensors: damaged: rows 40 to 49 fail their checksum"
    store = ActivationStore(shards)
    assert torch.equal(store.read(0, 190), VALUES[:190])
    assert torch.equal(store.read(200, 300), VALUES[200:])
    with pytest.raises(StudyError, match=message):
        store.read(199, 200)
    with pytest.raises(StudyError, match=message):
        store.gather(np.array([3, 192]))
    verify_shard(shards[0])
    with pytest.raises(StudyError, match=message):
        verify_shard(shards[1])


def test_verify_finds_what_opening_does_not(tmp_path):
    [shard] = write_store(tmp_path, VALUES, [N_ROWS])
    assert verify_shard(shard).rows == N_ROWS
    checksums = json.loads((shard / "manifest.json").read_text())["sha256"]
    edit_manifest(shard, sha256=checksums | {"values.safetensors": "0" * 64})
    ActivationStore([shard])
    with pytest.raises(StudyError, match=r"values\.safetensors: is not the file that its manifest describes"):
        verify_shard(shard)


def test_verify_is_a_command(tmp_path):
    shards = [str(shard) for shard in write_store(tmp_path, VALUES, [150, 150])]

    def verify():
        command = [sys.executable, "-m", "universality.cli", "activations", "verify", *shards]
        return subprocess.run(command, capture_output=True, text=True)

    run = verify()
    assert run.returncode == 0
    assert len(run.stdout.splitlines()) == 2
    damage(tmp_path / "shard_1", 3)
    run = verify()
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: {shards[1]}/values.safetensors: damaged")


def test_stores_of_other_tokenizers_are_not_joined(tmp_path):
    a = write_store(tmp_path / "a", VALUES, [150, 150])
    b = write_store(tmp_path / "b", VALUES, [150, 150], tokenizer="u")
    with pytest.raises(StudyError, match="different tokenizers, t and u"):
        check_aligned(a, b)


def test_rows_beyond_the_store_are_refused(tmp_path):
    store = ActivationStore(write_store(tmp_path, VALUES[:10], [10]))
    with pytest.raises(IndexError, match="rows -1 to 10 of a store of 10"):
        store.gather(np.array([0, 10, -1]))
