"""The kernels against plain torch and numpy."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import scipy.sparse
import torch

from universality.saes.sparse import selection
from universality.saes.sparse.adam import Adam
from universality.saes.sparse.pattern import Pattern
from universality.saes.sparse.products import add_outer, decode, entry_products, sum_by_feature
from universality.saes.sparse.selection import above, top_of_batch, top_of_rows

ROOT = Path(__file__).parents[3]


def as_dense(pattern: Pattern, values: torch.Tensor) -> np.ndarray:
    return scipy.sparse.csr_array(
        (values.float().numpy(), pattern.features, pattern.starts), shape=pattern.shape
    ).toarray()


def sorted_in_rows(pattern: Pattern) -> bool:
    return all(
        (np.diff(pattern.features[a:b]) > 0).all() for a, b in zip(pattern.starts, pattern.starts[1:], strict=False)
    )


def awkward(n_rows: int, n_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Random, with ties, zeros of both signs, a row of nothing positive, one all alike, huge and tiny values."""
    pre = torch.randn(n_rows, n_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    pre[0] = -pre[0].abs()
    pre[1] = 0.5
    pre[2, ::2] = 0.25
    pre[3, ::3], pre[3, 1::3] = 0.0, -0.0
    pre[4, :3] = torch.tensor([3e38, 1e-38, -3e38]).to(dtype)
    return pre


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("n_features", [5, 255, 256, 700])
@pytest.mark.parametrize("k", [1, 4, 130])
def test_top_of_rows_is_torchs_topk_of_positive_values(dtype, n_features, k):
    pre = awkward(37, n_features, dtype)
    pattern, values = top_of_rows(pre, k)
    assert sorted_in_rows(pattern)
    assert (values > 0).all()
    expected = torch.relu(torch.topk(pre, min(k, n_features)).values.float()).sort(1, descending=True).values.numpy()
    dense = as_dense(pattern, values)
    np.testing.assert_array_equal(-np.sort(-dense, 1)[:, : expected.shape[1]], expected)
    np.testing.assert_array_equal(dense[dense > 0], pre.float().numpy()[dense > 0])
    assert (pattern.features[pattern.starts[1] : pattern.starts[2]] == np.arange(min(k, n_features))).all()  # ties


@pytest.mark.parametrize("n_features", [5, 256, 700])
def test_above_finds_all_positive_values_above_thresholds(dtype, n_features, monkeypatch):
    pre = awkward(37, n_features, dtype)
    of_features = torch.linspace(-0.5, 0.5, n_features)
    for threshold in (0.0, 0.25, -3.0, of_features):
        low = torch.as_tensor(threshold).float().clamp_min(0)
        expected = np.where(pre.float() > low, pre.float(), 0)
        for counted in (selection._COUNTED, 0):
            monkeypatch.setattr(selection, "_COUNTED", counted)
            pattern, values = above(pre, threshold)
            assert sorted_in_rows(pattern)
            np.testing.assert_array_equal(as_dense(pattern, values), expected)


def test_thresholds_between_two_bfloat16_numbers_keep_all_that_exceeds_them():
    pre = torch.linspace(0.5, 8, 4096).bfloat16().unique()[None]
    for threshold in (5.02, 5.015625, 0.5, 3.999, 7.97):
        _, values = above(pre, threshold)
        assert torch.equal(values, pre[0][pre[0].float() > threshold])


def digest_of_everything() -> str:
    """Of what all kernels give for one input."""
    pre = awkward(200, 700, torch.float32)
    weights = torch.randn(700, 33, generator=torch.Generator().manual_seed(1))
    results = []
    for pattern, values in (top_of_rows(pre, 7), above(pre, 0.3), top_of_batch(lambda: pre.split(64), 7, 200)):
        total, dense = torch.zeros(700, 33), decode(pattern, values, weights)
        add_outer(pattern, values, dense, total)
        results += [values, dense, entry_products(pattern, dense, weights), total]
    module = Parameters()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    Adam(module, ("W_dec",)).step(0.01, 0.5)
    digest = hashlib.sha256()
    for tensor in (*results, *module.parameters()):
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return f"{numba.get_num_threads()} {digest.hexdigest()}"


def test_nothing_depends_on_the_number_of_threads():
    """Numba has as many as it is told when it starts, so each number is a process of its own."""
    code = "from tests.unit.saes.test_sparse import digest_of_everything; print(digest_of_everything())"
    told = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"NUMBA_NUM_THREADS": threads}, cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split()
        for threads in ("1", "2", "3")
    ]  # fmt: skip
    assert [threads for threads, _ in told] == ["1", "2", "3"]
    assert len({digest for _, digest in told}) == 1


@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("order", ["as it comes", "the largest last", "the largest first"])
def test_top_of_batch_is_torchs_topk_of_the_whole_batch(dtype, k, order):
    """However little the first rows, from which a threshold is guessed, tell of the others."""
    pre = awkward(40, 300, dtype)
    if order != "as it comes":
        pre = pre[pre.float().sum(1).argsort(descending=order == "the largest first")] * torch.linspace(1, 9, 40)[
            :, None
        ].to(dtype)
    pattern, values = top_of_batch(lambda: pre.split(7), k, len(pre))
    expected = torch.topk(pre.float().flatten(), min(k * 40, pre.numel())).values.clamp_min(0)
    np.testing.assert_array_equal(np.sort(values.float()), np.sort(expected[expected > 0]))
    dense = as_dense(pattern, values)
    np.testing.assert_array_equal(dense[dense > 0], pre.float().numpy()[dense > 0])
    assert sorted_in_rows(pattern)


def test_products_are_scipys():
    rng = np.random.default_rng(0)
    codes = scipy.sparse.random_array((30, 50), density=0.1, rng=rng, format="csr", dtype=np.float32)
    codes.sort_indices()
    pattern, values = (
        Pattern(codes.indptr.astype(np.int64), codes.indices.astype(np.int32), 50),
        torch.from_numpy(codes.data),
    )
    weights, dense = (torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in ((50, 19), (30, 19)))
    np.testing.assert_allclose(decode(pattern, values, weights), codes @ weights.numpy(), rtol=1e-5, atol=1e-6)
    all_products = dense.numpy() @ weights.numpy().T
    np.testing.assert_allclose(
        entry_products(pattern, dense, weights), all_products[codes.nonzero()], rtol=1e-4, atol=1e-5
    )
    total = torch.ones(50, 19)
    add_outer(pattern, values, dense, total)
    np.testing.assert_allclose(total, 1 + codes.T @ dense.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sum_by_feature(pattern, values), codes.sum(axis=0), rtol=1e-6)


class Parameters(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.W_enc = torch.nn.Parameter(torch.randn(7, 5).T)
        self.W_dec = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(7, 5)))
        self.bias = torch.nn.Parameter(torch.randn(7))


@pytest.mark.parametrize("max_norm", [1e9, 0.5])
def test_adam_is_torchs(max_norm):
    ours, theirs = Parameters(), Parameters()
    adam, reference = Adam(ours), torch.optim.Adam(theirs.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        rate = 0.01 / (1 + step)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad += gradient
            q.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        assert adam.step(rate, max_norm) == pytest.approx(float(norm), rel=1e-5)
        assert all((p.grad == 0).all() for p in ours.parameters())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_rows_of_unit_norm_stay_so_and_move_across_themselves():
    """The gradient's part along a row is taken out before anything else; the norm is what remains."""
    ours, theirs = Parameters(), Parameters()
    adam, reference = Adam(ours, ("W_dec",)), torch.optim.Adam([theirs.W_dec], lr=0.01)
    for seed in range(5):
        gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
        ours.W_dec.grad += gradient
        theirs.W_dec.grad = gradient - (gradient * theirs.W_dec).sum(1, keepdim=True) * theirs.W_dec.detach()
        expected = theirs.W_dec.grad.norm().item()
        reference.step()
        theirs.W_dec.data = torch.nn.functional.normalize(theirs.W_dec.data)
        assert adam.step(0.01, 1e9) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(ours.W_dec, theirs.W_dec, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(7))


def test_adam_goes_on_from_its_state():
    def stepped(adam, module, seed):
        for parameter in module.parameters():
            parameter.grad += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        adam.step(0.01, 1.0)

    first = Parameters()
    adam = Adam(first)
    stepped(adam, first, 0)
    second = Parameters()
    second.load_state_dict(first.state_dict())
    other = Adam(second)
    other.restore({name: tensor.clone() for name, tensor in adam.state().items()})
    for module, its_adam in ((first, adam), (second, other)):
        stepped(its_adam, module, 1)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_forgotten_rows_step_as_new_ones_do():
    module = Parameters()
    adam = Adam(module)
    for parameter in module.parameters():
        parameter.grad += 1
    adam.step(0.01, 1e9)
    for name in ("W_enc", "W_dec", "bias"):
        adam.forget(name, torch.tensor([2, 5]))
    state = adam.state()
    assert (state["m.W_enc"].T[[2, 5]] == 0).all()
    assert (state["v.W_dec"][[2, 5]] == 0).all()
    assert (state["m.bias"][[2, 5]] == 0).all()
    assert (state["m.W_dec"][[0, 1, 3, 4, 6]] > 0).all()
