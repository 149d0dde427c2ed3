import torch

from universality.saes.settings import ReluL1Settings
from universality.saes.standard import StandardSAE


def test_dead_features_take_the_directions_of_what_is_badly_reconstructed():
    sae = StandardSAE(8, 20, ReluL1Settings(l1_coefficient=1.0, resample_steps=10)).train()
    sae.initialise(torch.zeros(8), torch.Generator().manual_seed(0))
    sae.dead_steps = 5
    dead = torch.tensor([3, 11, 19])
    sae.steps_since_fired[dead] = 5
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    target = x.clone()
    target[:60] = 0.0  # four inputs have all the loss, the others almost none
    before = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    step = sae.loss(x, x, sae.sparse_entries(x), 1.0)
    step = step._replace(x_hat=torch.zeros_like(x))
    found = sae.resample(target, step, torch.Generator().manual_seed(2))
    assert torch.equal(found, dead)
    directions = torch.nn.functional.normalize(target[60:])
    cosines = torch.nn.functional.normalize(sae.W_dec[dead]) @ directions.T
    torch.testing.assert_close(cosines.max(1).values, torch.ones(3))
    alive = torch.ones(20, dtype=torch.bool)
    alive[dead] = False
    assert torch.equal(sae.W_dec[alive], before["W_dec"][alive])
    assert torch.equal(sae.W_enc[:, alive], before["W_enc"][:, alive])
    norms = sae.W_enc[:, dead].norm(dim=0)
    torch.testing.assert_close(norms, torch.full((3,), 0.2 * float(before["W_enc"][:, alive].norm(dim=0).mean())))
    assert len(sae.resample(target, step, torch.Generator())) == 0  # nothing is dead any more


def test_nothing_is_resampled_where_nothing_or_everything_is_dead():
    sae = StandardSAE(8, 20, ReluL1Settings(l1_coefficient=1.0)).train()
    sae.dead_steps = 5
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    step = sae.loss(x, x, sae.sparse_entries(x), 1.0)
    for since in (0, 5):
        sae.steps_since_fired[:] = since
        assert len(sae.resample(x, step, torch.Generator())) == 0
