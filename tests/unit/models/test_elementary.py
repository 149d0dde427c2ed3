import numba
import numpy as np
import pytest
import torch

from universality.kernels.elementary import exp2_nonpositive, load, rounded, silu, softplus


def over(function, x):
    """A kernel function of every element."""

    @numba.njit
    def apply(values, out):
        for i in range(values.size):
            out[i] = function(values[i])

    out = np.empty(x.size, dtype=np.float32)
    apply(x.astype(np.float32), out)
    return out.astype(np.float64)


def test_exponential_is_accurate_to_single_precision():
    x = -np.geomspace(1e-8, 125, 20001).astype(np.float32)
    assert np.abs(over(exp2_nonpositive, x) / np.exp2(x.astype(np.float64)) - 1).max() < 3e-7
    assert over(exp2_nonpositive, np.zeros(1)) == 1.0  # a decay of nothing, over and over, leaves a state as it is
    assert over(exp2_nonpositive, np.array([-1e30])) < 1e-37


@pytest.mark.parametrize(
    ("ours", "theirs"), [(softplus, torch.nn.functional.softplus), (silu, torch.nn.functional.silu)]
)
def test_functions_are_torchs(ours, theirs):
    x = np.concatenate([np.linspace(-20, 20, 40001), [-60.0, 0.0, 60.0]]).astype(np.float32)
    expected = theirs(torch.from_numpy(x).double(), **({"threshold": 100} if ours is softplus else {})).numpy()
    # In the tail the rounding of the argument itself costs |x| * 6e-8.
    np.testing.assert_allclose(over(ours, x), expected, rtol=4e-6, atol=1e-30)


def test_bfloat16_is_read_and_rounded_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(10_000, generator=generator), torch.tensor([0.0, 1.00390625, 1.01171875, -3e38])])

    @numba.njit
    def through(values, bits, back):
        for i in range(values.size):
            bits[i] = rounded(bits, values[i])
            back[i] = load(bits[i])

    bits, back = np.empty(len(x), dtype=np.uint16), np.empty(len(x), dtype=np.float32)
    through(x.numpy(), bits, back)
    assert np.array_equal(bits, x.bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(back, x.bfloat16().float().numpy())
