import itertools
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
import scipy.stats
import torch

from tests.conftest import write_store
from universality.activations.batches import StoredBatches
from universality.activations.store import ActivationStore
from universality.errors import StudyError

N_ROWS, WIDTH = 500, 4
VALUES = torch.arange(N_ROWS * WIDTH, dtype=torch.float32).reshape(N_ROWS, WIDTH)  # tells each row


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return ActivationStore(write_store(tmp_path_factory.mktemp("store"), VALUES, [200, 1, 299]))


def taken(batches: StoredBatches, size: int, count: int, seed: int = 0, start: int = 0) -> torch.Tensor:
    """`count` batches in a row [count, size, WIDTH]."""
    with closing(batches.batches(size, seed, start)) as found:
        return torch.stack(list(itertools.islice(found, count)))


def test_every_row_comes_once_an_epoch_each_in_another_order(store):
    rows = taken(StoredBatches(store), 50, 30).flatten(0, 1)
    assert rows.dtype == torch.float32
    epochs = rows.reshape(3, N_ROWS, WIDTH)
    for epoch in epochs:
        assert torch.equal(epoch[epoch[:, 0].argsort()], VALUES)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(rows.reshape(30, 50, WIDTH), taken(StoredBatches(store), 50, 30))
    assert not torch.equal(epochs[0][:50], taken(StoredBatches(store), 50, 1, seed=1)[0])


@pytest.mark.parametrize("size", [1, 7, 64, 499])
def test_the_batches_depend_neither_on_the_gather_size_nor_on_the_first_step(store, size):
    count = 2 * N_ROWS // size + 2
    whole = taken(StoredBatches(store), size, count)
    for gather_bytes in (1, 1000, 7777, 10**9):
        assert torch.equal(taken(StoredBatches(store, gather_bytes), size, count), whole)
    for start in (1, count // 2, count - 1):
        assert torch.equal(taken(StoredBatches(store, 5000), size, count - start, start=start), whole[start:])


def test_a_row_is_as_likely_in_every_batch(store):
    """Over many epochs, count in which of the ten batches of an epoch each row came."""
    epochs, n_batches = 300, 10
    numbers = taken(StoredBatches(store), N_ROWS // n_batches, epochs * n_batches)[..., 0] / WIDTH
    batch = np.tile(np.repeat(np.arange(n_batches), N_ROWS // n_batches), epochs)
    counts = np.zeros((N_ROWS, n_batches))
    np.add.at(counts, (numbers.flatten().long().numpy(), batch), 1)
    expected = epochs / n_batches
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert scipy.stats.chi2.sf(statistic, (N_ROWS - 1) * (n_batches - 1)) > 0.001


def test_neighbours_in_the_store_are_no_neighbours_in_a_batch(store):
    positions = taken(StoredBatches(store), 100, 5).flatten(0, 1)[:, 0].argsort()
    distance = (positions[1:] - positions[:-1]).abs().float().mean()
    assert abs(float(distance) - N_ROWS / 3) < 30  # of two random places, a third of the length


def test_damage_met_in_the_background_is_raised_by_the_reader(tmp_path):
    [shard] = write_store(tmp_path, VALUES, [N_ROWS])
    path = shard / "values.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StudyError, match=r"values\.safetensors: damaged"):
        taken(StoredBatches(ActivationStore([shard])), 50, 10)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_statistics_equal_numpy_wherever_shards_meet(tmp_path, dtype):
    generator = torch.Generator().manual_seed(3)
    values = 100 + torch.randn(9000, WIDTH, generator=generator)  # three blocks; a mean far from zero
    exact = (values.bfloat16() if dtype == "bf16" else values).double().numpy()
    found = []
    for name, sizes in (("a", [9000]), ("b", [1, 5000, 3999])):
        found.append(StoredBatches(ActivationStore(write_store(tmp_path / name, values, sizes, dtype))).statistics())
    np.testing.assert_allclose(found[0].mean, exact.mean(0), rtol=1e-13)
    assert found[0].mean_norm == pytest.approx(np.linalg.norm(exact, axis=1).mean(), rel=1e-13)
    assert found[0].variance == pytest.approx(exact.var(0).sum(), rel=1e-11)
    assert found[0].n_rows == 9000
    assert torch.equal(found[0].mean, found[1].mean)
    assert found[0][2:] == found[1][2:]


MEMORY = """
import itertools, resource, sys
from pathlib import Path
import torch
from universality.activations.batches import StoredBatches
from universality.activations.store import ActivationStore

store = ActivationStore(sorted(Path(sys.argv[1]).iterdir()))
batches = StoredBatches(store, gather_bytes=2**20)
next(StoredBatches(store, 2**10).batches(16, 0))  # threads and their stacks
used = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]),) * 2)
batches.statistics()
rows = sum(len(batch) for batch in itertools.islice(batches.batches(256, 0), store.n_rows // 256))
print(rows)
try:
    store.read(0, store.n_rows)
except (MemoryError, RuntimeError):
    print("the limit holds")
"""


def test_a_store_larger_than_the_memory_is_read(tmp_path):
    """160 MiB of values in 64 MiB of memory beside the interpreter's; mapped pages do not count, as they can go."""
    n_rows, width = 81_920, 512
    values = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(0))
    write_store(tmp_path, values, [n_rows // 2, n_rows // 2])
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), str(64 * 2**20)], capture_output=True, text=True)
    assert run.stdout.split("\n")[:2] == [str(n_rows), "the limit holds"], run.stderr
