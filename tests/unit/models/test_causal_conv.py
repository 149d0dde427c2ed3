import pytest
import torch

from universality.kernels.causal_conv import causal_conv_silu, causal_conv_silu_of, causal_conv_silu_reference


@pytest.mark.parametrize(
    ("n_batch", "n_pos", "n_chan", "taps"), [(2, 9, 5, 4), (1, 1, 3, 4), (3, 2, 70, 4), (2, 20, 8, 1)]
)
def test_fused_equals_torch(n_batch, n_pos, n_chan, taps):
    torch.manual_seed(n_chan)
    values = [torch.randn(n_batch, n_pos, n_chan), torch.randn(n_chan, taps), torch.randn(n_chan)]
    ours = [v.clone().requires_grad_() for v in values]
    theirs = [v.double().requires_grad_() for v in values]
    out, expected = causal_conv_silu(*ours), causal_conv_silu_reference(*theirs)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", [1, 2, 40])
def test_what_came_before_may_be_given(at):
    x, weight, bias = torch.randn(2, 50, 70), torch.randn(65, 4), torch.randn(65)
    whole = causal_conv_silu_of(x, 5, weight, bias)
    before = torch.nn.functional.pad(x[:, :at, 5:], (0, 0, 3, 0))[:, -3:]
    parts = [causal_conv_silu_of(x[:, :at], 5, weight, bias), causal_conv_silu_of(x[:, at:], 5, weight, bias, before)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    with pytest.raises(ValueError, match=r"before has shape \(2, 2, 65\), the convolution needs \(2, 3, 65\)"):
        causal_conv_silu_of(x, 5, weight, bias, before[:, 1:])


def test_nothing_flows_from_the_future():
    x = torch.randn(1, 10, 4)
    later = x.clone()
    later[:, 6:] += 1
    weight, bias = torch.randn(4, 4), torch.randn(4)
    before, after = causal_conv_silu(x, weight, bias), causal_conv_silu(later, weight, bias)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6], after[:, 6])
