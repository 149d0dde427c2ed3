import pytest
import torch

from universality.kernels.head_scan import chunked_scan, chunked_scan_reference, gated_head_scan

# (B, L, H, P, G, N): ones, lengths off and on the chunk of 64, heads that share groups
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 5, 3, 4, 1, 2), (1, 64, 2, 8, 2, 4), (2, 65, 4, 3, 2, 5), (1, 200, 6, 16, 3, 7)]


def inputs(shape, dtype=torch.float64, with_state=True):
    n_batch, n_pos, heads, width, groups, n_state = shape
    g = torch.Generator().manual_seed(sum(shape))

    def random(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    delta = torch.nn.functional.softplus(random(n_batch, n_pos, heads) - 1)
    values = [random(n_batch, n_pos, heads, width), delta, -8 * random(heads).abs()]
    values += [random(n_batch, n_pos, groups, n_state), random(n_batch, n_pos, groups, n_state), random(heads)]
    values.append(random(n_batch, heads, width, n_state) if with_state else None)
    return [None if v is None else v.requires_grad_() for v in values]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_state", [True, False])
def test_chunks_equal_the_recurrence_and_so_do_their_gradients(shape, with_state):
    exact = inputs(shape, with_state=with_state)
    ours = [None if v is None else v.detach().float().requires_grad_() for v in exact]
    y, last = chunked_scan(*ours)
    expected, states = chunked_scan_reference(*exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.double(), states[:, -1], rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(expected)
    ((y * weight).sum() + last.square().sum()).backward()
    ((expected * weight).sum() + states[:, -1].square().sum()).backward()
    for mine, theirs in zip(ours, exact, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3)


def test_gradients_of_the_reference_are_those_of_finite_differences():
    values = [v for v in inputs((1, 4, 2, 2, 1, 2)) if v is not None]
    assert torch.autograd.gradcheck(lambda *v: chunked_scan_reference(*v)[0], values)


def test_a_strong_decay_over_a_long_chunk_stays_finite():
    x, delta, A, B, C, D, _ = inputs((1, 130, 2, 3, 1, 2), torch.float32, with_state=False)
    y, last = chunked_scan(x, delta + 50, A - 50, B, C, D)
    (y.sum() + last.sum()).backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(v.grad).all() for v in (x, B, C, D))


def test_going_on_from_a_state_equals_one_scan():
    x, delta, A, B, C, D, state = (v.detach().float() for v in inputs((2, 100, 4, 3, 2, 5)))
    whole, last = chunked_scan(x, delta, A, B, C, D, state)
    first, middle = chunked_scan(x[:, :37], delta[:, :37], A, B[:, :37], C[:, :37], D, state)
    second, end = chunked_scan(x[:, 37:], delta[:, 37:], A, B[:, 37:], C[:, 37:], D, middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-4)


def test_bfloat16_inputs_keep_a_float32_state():
    values = [v.detach().float() for v in inputs((2, 70, 2, 4, 1, 3), with_state=False) if v is not None]
    rounded = [v.bfloat16() for v in values]
    y, last = chunked_scan(*rounded[:2], values[2], *rounded[3:5], values[5])
    expected, _ = chunked_scan(
        *(v.float() for v in rounded[:2]), values[2], *(v.float() for v in rounded[3:5]), values[5]
    )
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    torch.testing.assert_close(y, expected.bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_fused_scan_with_its_surroundings_equals_the_parts(shape):
    n_batch, n_pos, heads, width, _, n_state = shape
    _, _, A, B, C, D, _ = (None if v is None else v.detach().float() for v in inputs(shape))
    g = torch.Generator().manual_seed(1)
    u = torch.randn(n_batch, n_pos, heads, width, generator=g)
    mixed = torch.cat([u.flatten(2), B.flatten(2), C.flatten(2)], -1)
    projected = torch.randn(n_batch, n_pos, heads * width + mixed.shape[2] + heads, generator=g)
    bias, limit = torch.randn(heads, generator=g), (0.1, 1.5)
    delta = torch.nn.functional.softplus(projected[..., -heads:] + bias).clamp(*limit)
    y, states = chunked_scan_reference(u, delta, A, B, C, D)
    expected = y.flatten(2) * torch.nn.functional.silu(projected[..., : heads * width])
    ours, last = gated_head_scan(mixed, projected, bias, limit, A, D, n_state)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, states[:, -1], rtol=1e-4, atol=1e-4)
    if n_pos > 1:
        at = n_pos // 2
        first, middle = gated_head_scan(mixed[:, :at], projected[:, :at], bias, limit, A, D, n_state)
        second, end = gated_head_scan(mixed[:, at:], projected[:, at:], bias, limit, A, D, n_state, middle)
        torch.testing.assert_close(torch.cat([first, second], 1), ours)
        torch.testing.assert_close(end, last)
    rounded = gated_head_scan(mixed.bfloat16(), projected.bfloat16(), bias, limit, A, D, n_state)
    exact = gated_head_scan(mixed.bfloat16().float(), projected.bfloat16().float(), bias, limit, A, D, n_state)
    assert all(torch.equal(one, other) for one, other in zip(rounded, exact, strict=True))
