"""Kernels over sequences of any lengths in one row, against each sequence by itself."""

import pytest
import torch

from universality.kernels.causal_conv import causal_conv_silu_of
from universality.kernels.head_scan import gated_head_scan
from universality.kernels.selective_scan import gated_scan

LENGTHS = [3, 0, 40, 1, 70]
STARTS = torch.tensor([0, 3, 3, 43, 44, 114])
ROWS = 114


def each(values: list[torch.Tensor]):
    """For each sequence its rows of every value, as a batch of one."""
    return ([part[None] for part in parts] for parts in zip(*(x.split(LENGTHS) for x in values), strict=True))


def test_convolution():
    torch.manual_seed(0)
    x, weight, bias, before = torch.randn(ROWS, 70), torch.randn(65, 4), torch.randn(65), torch.randn(5, 3, 65)
    packed = causal_conv_silu_of(x, 5, weight, bias, before, STARTS)
    alone = [causal_conv_silu_of(one, 5, weight, bias, before[n : n + 1])[0] for n, (one,) in enumerate(each([x]))]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=0)


def test_selective_scan():
    torch.manual_seed(0)
    u, step, xz, B, C = (torch.randn(ROWS, width) for width in (70, 70, 140, 5, 5))
    bias, A, D, state = torch.randn(70), -torch.rand(70, 5), torch.randn(70), torch.randn(5, 70, 5)
    y, last = gated_scan(u, step, bias, A, B, C, D, xz, state, None, STARTS)
    for n, ((u1, step1, B1, C1, xz1), rows) in enumerate(zip(each([u, step, B, C, xz]), y.split(LENGTHS), strict=True)):
        one, end = gated_scan(u1, step1, bias, A, B1, C1, D, xz1, state[n : n + 1])
        torch.testing.assert_close(rows, one[0], rtol=0, atol=0)
        torch.testing.assert_close(last[n], end[0], rtol=0, atol=0)


def test_head_scan():
    torch.manual_seed(0)
    heads, width, n_state = 3, 8, 5
    mixed, projected = torch.randn(ROWS, 24 + 2 * n_state), torch.randn(ROWS, 2 * 24 + 2 * n_state + heads)
    given = torch.randn(heads), (0.0, 1.0), -torch.rand(heads), torch.randn(heads), n_state
    state = torch.randn(5, heads, width, n_state)
    y, last = gated_head_scan(mixed, projected, *given, state, None, STARTS)
    for n, ((m, p), rows) in enumerate(zip(each([mixed, projected]), y.split(LENGTHS), strict=True)):
        one, end = gated_head_scan(m, p, *given, state[n : n + 1])
        torch.testing.assert_close(rows, one[0], rtol=0, atol=0)
        torch.testing.assert_close(last[n], end[0], rtol=0, atol=0)


def test_shapes_that_do_not_fit_are_refused():
    weight, bias, A, D = torch.randn(4, 4), torch.randn(4), -torch.rand(4, 2), torch.randn(4)
    with pytest.raises(ValueError, match=r"values of shape \(114, 4\): must have 3 axes"):
        causal_conv_silu_of(torch.randn(ROWS, 4), 0, weight, bias)
    with pytest.raises(ValueError, match=r"values of shape \(2, 57, 4\): must have 2 axes"):
        causal_conv_silu_of(torch.randn(2, 57, 4), 0, weight, bias, None, STARTS)
    u, B = torch.randn(ROWS, 4), torch.randn(ROWS, 2)
    with pytest.raises(ValueError, match=r"xz has shape \(113, 8\), which does not fit u of \(114, 4\)"):
        gated_scan(u, u, bias, A, B, B, D, torch.randn(ROWS - 1, 8), None, None, STARTS)
    given = bias[:2], (0.0, 1.0), A[:2, 0], D[:2], 3
    with pytest.raises(ValueError, match="do not fit 2 heads and N=3"):
        gated_head_scan(torch.randn(ROWS, 10), torch.randn(ROWS - 1, 16), *given, None, None, STARTS)


@pytest.mark.parametrize("starts", [[], [0, 9, 3, 114], [1, 114], [0, 113]])
def test_starts_that_are_not_those_of_the_rows_are_refused(starts):
    x, weight, bias = torch.randn(ROWS, 4), torch.randn(4, 4), torch.randn(4)
    with pytest.raises(ValueError, match=r"cu_seqlens: is \[.*\]; must rise from 0 to the 114 rows"):
        causal_conv_silu_of(x, 0, weight, bias, None, torch.tensor(starts))
