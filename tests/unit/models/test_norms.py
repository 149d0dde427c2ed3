import pytest
import torch

from universality.kernels.norms import rms_norm


@pytest.mark.parametrize(("width", "group"), [(1, 0), (7, 0), (64, 0), (200, 0), (192, 96), (10, 5)])
def test_rms_norm_is_torchs(width, group):
    g = torch.Generator().manual_seed(width)
    x, weight = 3 * torch.randn(2, 5, width, generator=g), torch.randn(width, generator=g)
    size = group or width
    normed = torch.nn.functional.rms_norm(x.double().unflatten(-1, (-1, size)), (size,), eps=1e-5).flatten(-2)
    expected = (normed * weight).float()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, torch.float32, group), expected, rtol=1e-5, atol=1e-6)
    ours = rms_norm(x, weight, 1e-5, torch.bfloat16, group)
    torch.testing.assert_close(ours, expected.bfloat16(), rtol=1e-2, atol=1e-3)
    assert torch.equal(rms_norm(x.bfloat16(), weight, 1e-5, torch.float32, group),
                       rms_norm(x.bfloat16().float(), weight, 1e-5, torch.float32, group))  # fmt: skip
