import numpy as np
import pytest
import torch

from universality.kernels.selective_scan import gated_scan, selective_scan, selective_scan_reference
from universality.kernels.selective_step import selective_step, selective_step_reference

# (B, L, E, N): ones, sizes off every block and chunk boundary, and sizes on them
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 4), (1, 64, 64, 16), (3, 65, 65, 2), (2, 130, 70, 16), (1, 200, 129, 7)]


def inputs(shape, dtype=torch.float32, with_state=True):
    n_batch, n_pos, n_chan, n_state = shape
    g = torch.Generator().manual_seed(sum(shape))

    def random(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    delta = torch.nn.functional.softplus(random(n_batch, n_pos, n_chan) - 1)
    A = -8 * torch.rand(n_chan, n_state, generator=g, dtype=torch.float64).to(dtype)
    values = [random(n_batch, n_pos, n_chan), delta, A]
    values += [random(n_batch, n_pos, n_state), random(n_batch, n_pos, n_state), random(n_chan)]
    values.append(random(n_batch, n_chan, n_state) if with_state else None)
    return [None if v is None else v.requires_grad_() for v in values]


def loop_in_numpy(u, delta, A, B, C, D, state):
    """The recurrence written index by index, independent of torch."""
    n_batch, n_pos, n_chan = u.shape
    y = np.zeros_like(u)
    h = state.copy()
    for b in range(n_batch):
        for t in range(n_pos):
            for e in range(n_chan):
                for n in range(A.shape[1]):
                    h[b, e, n] = (
                        np.exp(delta[b, t, e] * A[e, n]) * h[b, e, n] + delta[b, t, e] * u[b, t, e] * B[b, t, n]
                    )
                y[b, t, e] = h[b, e] @ C[b, t] + D[e] * u[b, t, e]
    return y, h


def test_reference_is_the_recurrence():
    values = inputs((2, 5, 3, 4), torch.float64)
    y, states = selective_scan_reference(*values)
    expected_y, expected_state = loop_in_numpy(*(v.detach().numpy() for v in values))
    np.testing.assert_allclose(y.detach(), expected_y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(states[:, -1].detach(), expected_state, rtol=1e-12, atol=1e-12)


def test_reference_passes_gradcheck():
    values = inputs((2, 4, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(selective_scan_reference, values)


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_equals_reference(shape, with_state):
    fused = inputs(shape, torch.float32, with_state)
    exact = [None if v is None else v.detach().double().requires_grad_() for v in fused]
    y, last = selective_scan(*fused)
    expected_y, states = selective_scan_reference(*exact)
    torch.testing.assert_close(y.double(), expected_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.double(), states[:, -1], rtol=1e-5, atol=1e-5)

    weight_y, weight_state = torch.randn_like(y), torch.randn_like(last)
    ((y * weight_y).sum() + (last * weight_state).sum()).backward()
    ((expected_y * weight_y).sum() + (states[:, -1] * weight_state).sum()).backward()
    for ours, theirs in zip(fused, exact, strict=True):
        if ours is not None:
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5 * scale)


def test_bfloat16_inputs_keep_a_float32_state():
    values = [v.detach() for v in inputs((2, 70, 20, 8))]
    u = values[0].bfloat16()
    y, last = selective_scan(u, *values[1:])
    expected, states = selective_scan_reference(u.float(), *values[1:])
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    torch.testing.assert_close(last, states[:, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=5e-2)


def test_two_halves_joined_by_the_state_are_the_whole():
    u, delta, A, B, C, D, state = (v.detach() for v in inputs((2, 100, 10, 4)))
    whole, last = selective_scan(u, delta, A, B, C, D, state)
    first, middle = selective_scan(u[:, :37], delta[:, :37], A, B[:, :37], C[:, :37], D, state)
    second, end = selective_scan(u[:, 37:], delta[:, 37:], A, B[:, 37:], C[:, 37:], D, middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_scan_with_its_surroundings_equals_the_parts(shape):
    """softplus before and the gate after; bfloat16 inputs count as the same values in float32."""
    u, _, A, B, C, D, _ = (None if v is None else v.detach() for v in inputs(shape))
    n_batch, n_pos, n_chan, _ = shape
    step, bias = torch.randn(n_batch, n_pos, n_chan), torch.randn(n_chan)
    xz = torch.randn(n_batch, n_pos, 2 * n_chan)
    delta = torch.nn.functional.softplus(step + bias)
    y, states = selective_scan_reference(u, delta, A, B, C, D)
    gated, last = gated_scan(u, step, bias, A, B, C, D, xz)
    expected = y * torch.nn.functional.silu(xz[..., n_chan:])
    torch.testing.assert_close(gated, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, states[:, -1], rtol=1e-4, atol=1e-4)
    if n_pos > 1:
        at = n_pos // 2
        halves = zip(*(value.split([at, n_pos - at], 1) for value in (u, step, B, C, xz)), strict=True)
        (u1, step1, B1, C1, xz1), (u2, step2, B2, C2, xz2) = halves
        first, middle = gated_scan(u1, step1, bias, A, B1, C1, D, xz1)
        second, end = gated_scan(u2, step2, bias, A, B2, C2, D, xz2, middle)
        torch.testing.assert_close(torch.cat([first, second], 1), gated)
        torch.testing.assert_close(end, last)
    rounded = [v.bfloat16() for v in (u, step, xz)]
    exact = gated_scan(rounded[0].float(), rounded[1].float(), bias, A, B, C, D, rounded[2].float())
    ours = gated_scan(rounded[0], rounded[1], bias, A, B, C, D, rounded[2])
    assert all(torch.equal(one, other) for one, other in zip(ours, exact, strict=True))


def test_gradients_of_the_reference_are_those_of_finite_differences():
    values = [v for v in inputs((2, 5, 3, 2), torch.float64) if v is not None]
    assert torch.autograd.gradcheck(lambda *v: selective_scan_reference(*v)[0], values)


@pytest.mark.parametrize("n_chan", [5, 130])
def test_one_position_of_many_variants_is_the_formula(n_chan):
    generator = torch.Generator().manual_seed(3)
    P, S, N = 3, 2, 4
    u, C, B = (torch.randn(P, S, size, generator=generator) for size in (n_chan, N, N))
    delta = torch.rand(P, S, n_chan, generator=generator)
    A, D = -torch.rand(n_chan, N, generator=generator), torch.randn(n_chan, generator=generator)
    state = torch.randn(S, n_chan, N, generator=generator)
    expected = selective_step_reference(u, delta, A, B, C, D, state)
    torch.testing.assert_close(selective_step(u, delta, A, B, C, D, state), expected, rtol=1e-5, atol=1e-5)
    for p in range(P):  # and the scan of one position
        y, _ = selective_scan_reference(u[p, :, None], delta[p, :, None], A, B[p, :, None], C[p, :, None], D, state)
        torch.testing.assert_close(expected[p], y[:, 0])
    with pytest.raises(ValueError, match="shapes of u, delta, A, B, C, D, state do not fit each other"):
        selective_step(u, delta, A, B, C, D, state[:1])


def test_a_place_for_the_output_that_would_not_hold_it_is_refused():
    u, delta, A, B, C, D, _ = (x.detach() for x in inputs((2, 5, 3, 4)))
    given = (u, delta, torch.zeros(3), A, B, C, D, torch.randn(2, 5, 6))
    whole, _ = gated_scan(*given)
    out = torch.empty_like(whole)
    gated_scan(*given, out=out)
    torch.testing.assert_close(out, whole, rtol=0, atol=0)
    for wrong in (out[:, :4], torch.empty(2, 3, 5).mT, out.double()):
        with pytest.raises(ValueError, match="out: is .*must be contiguous float32"):
            gated_scan(*given, out=wrong)
