"""Kernels on a GPU against the plain recurrences; they say so where there is no GPU. Speed: benchmarks/cuda_scan.py."""

import pytest
import torch

from tests.conftest import LENGTH, tiny_model
from universality.kernels.causal_conv import causal_conv_silu, causal_conv_silu_reference
from universality.kernels.head_scan import chunked_scan, chunked_scan_reference
from universality.kernels.selective_scan import selective_scan, selective_scan_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.fixture(autouse=True)
def as_in_a_job(monkeypatch):
    """Deterministic, as every job computes."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g).cuda() for shape in shapes]


def test_selective_scan():
    pytest.importorskip("mamba_ssm", reason="the gpu extra is not installed")
    u, step, A, B, C, D = on_gpu((2, 130, 64), (2, 130, 64), (64, 16), (2, 130, 16), (2, 130, 16), (64,))
    values = (u, torch.nn.functional.softplus(step), -A.exp(), B, C, D)
    y, last = selective_scan(*values)
    expected, states = selective_scan_reference(*values)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(last, states[:, -1], rtol=1e-3, atol=1e-3)


def test_chunked_scan():
    shapes = ((2, 130, 4, 64), (2, 130, 4), (4,), (2, 130, 1, 128), (2, 130, 1, 128), (4,))
    x, step, A, B, C, D = on_gpu(*shapes)
    values = (x, torch.nn.functional.softplus(step), -A.exp(), B, C, D)
    y, last = chunked_scan(*values)
    expected, states = chunked_scan_reference(*values)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(last, states[:, -1], rtol=2e-2, atol=2e-2)


def test_causal_conv():
    x, weight, bias = on_gpu((2, 130, 64), (64, 4), (64,))
    expected = causal_conv_silu_reference(x, weight, bias)
    torch.testing.assert_close(causal_conv_silu(x, weight, bias), expected, rtol=1e-3, atol=1e-3)


def test_a_model_computes_on_the_gpu_what_it_does_on_the_cpu(family):
    model = tiny_model(family)
    tokens = torch.randint(0, 50, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = model.run(tokens).logits
    model.hf.cuda()
    torch.testing.assert_close(model.run(tokens.cuda()).logits.cpu(), expected, rtol=1e-2, atol=1e-2)
