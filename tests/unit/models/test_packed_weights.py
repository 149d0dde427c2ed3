"""Laid out weights against torch's own products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from universality.models.packed_weights import _LAID_OUT, project_packed


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_weights_as_they_lie(bias):
    linear = nn.Linear(48, 70, bias=bias).requires_grad_(False)
    x = torch.randn(2, 33, 48)
    torch.testing.assert_close(project_packed(linear, x), linear(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(project_packed(linear, x[:, 0]), linear(x[:, 0]), rtol=1e-5, atol=1e-5)
    assert project_packed(linear, x[:0]).shape == (0, 33, 70)


@pytest.mark.parametrize(("n_in", "n_out"), [(768, 500), (1536, 80), (1536, 768)])
def test_a_row_depends_neither_on_other_rows_nor_on_threads(n_in, n_out):
    linear, x = nn.Linear(n_in, n_out).requires_grad_(False), torch.randn(300, n_in)
    whole, before = project_packed(linear, x), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (1, 17, 100, 300):
                assert torch.equal(project_packed(linear, x[:rows]), whole[:rows])
    finally:
        torch.set_num_threads(before)


def test_a_weight_that_changes_is_laid_out_anew():
    linear, x = nn.Linear(16, 8).requires_grad_(False), torch.randn(4, 16)
    project_packed(linear, x)
    linear.weight.mul_(2)
    torch.testing.assert_close(project_packed(linear, x), linear(x), rtol=1e-5, atol=1e-5)
    linear.weight = nn.Parameter(torch.randn(8, 16), requires_grad=False)
    torch.testing.assert_close(project_packed(linear, x), linear(x), rtol=1e-5, atol=1e-5)
    linear.load_state_dict(nn.Linear(16, 8).state_dict())
    torch.testing.assert_close(project_packed(linear, x), linear(x), rtol=1e-5, atol=1e-5)
    linear.weight.data = torch.randn(8, 16)
    torch.testing.assert_close(project_packed(linear, x), linear(x), rtol=1e-5, atol=1e-5)
    linear.bfloat16().float()
    torch.testing.assert_close(project_packed(linear, x), linear(x), rtol=1e-5, atol=1e-5)


def test_what_is_laid_out_goes_with_the_weight():
    linear, x = nn.Linear(16, 8).requires_grad_(False), torch.randn(4, 16)
    before = len(_LAID_OUT)
    project_packed(linear, x)
    assert len(_LAID_OUT) == before + 1
    project_packed(linear.bfloat16(), x)
    assert len(_LAID_OUT) == before
    project_packed(linear.float(), x)
    del linear
    assert len(_LAID_OUT) == before


def test_gradients_flow_where_they_are_wanted():
    linear, x = nn.Linear(16, 8), torch.randn(4, 16)
    with torch.no_grad():
        project_packed(linear, x)
    project_packed(linear, x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(8, 16))
    linear.weight.requires_grad_(False)
    project_packed(linear, x).sum().backward()
    torch.testing.assert_close(linear.bias.grad, torch.full((8,), 8.0))  # of both
    frozen, x = linear.requires_grad_(False), x.requires_grad_()
    project_packed(frozen, x).sum().backward()
    torch.testing.assert_close(x.grad, frozen.weight.sum(0).expand(4, 16))


def test_weights_of_another_type_multiply_as_they_do():
    linear, x = nn.Linear(16, 8).bfloat16().requires_grad_(False), torch.randn(4, 16)
    assert torch.equal(project_packed(linear, x), F.linear(x.bfloat16(), linear.weight, linear.bias))
    with torch.inference_mode():  # whose weights do not count what is written to them
        linear = nn.Linear(16, 8)
        project_packed(linear, x)
        linear.weight.mul_(2)
        torch.testing.assert_close(project_packed(linear, x), linear(x), rtol=1e-5, atol=1e-5)
