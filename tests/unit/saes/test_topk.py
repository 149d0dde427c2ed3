import numpy as np
import torch

from universality.saes.settings import TopKSettings
from universality.saes.topk import TopKSAE


def sae_with_dead_features(aux_coefficient: float) -> TopKSAE:
    settings = TopKSettings(k=2, k_aux=3, aux_coefficient=aux_coefficient)
    sae = TopKSAE(6, 12, settings)
    sae.initialise(torch.zeros(6), torch.Generator().manual_seed(0))
    sae.dead_steps = 2
    sae.b_enc.data[8:] = -100  # the last four never fire
    sae.steps_since_fired[8:] = 5
    return sae


def loss_of(sae, x):
    return sae.loss(x, x, sae.sparse_entries(x), 1.0)


def test_only_the_auxiliary_loss_reaches_dead_features():
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    for coefficient, reached in ((0.0, False), (0.5, True)):
        sae = sae_with_dead_features(coefficient)
        sae.b_enc.data[8:] = -0.01 if reached else -100
        loss_of(sae, x).loss.backward()
        assert bool((sae.W_dec.grad[8:] != 0).any()) == reached
    assert bool((sae.W_dec.grad[:8] != 0).any())


def test_the_auxiliary_loss_is_its_formula():
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
    sae, plain = sae_with_dead_features(0.25), sae_with_dead_features(0.0)
    codes = plain.encode(x)
    error = (x - plain.decode(codes)).detach().numpy()
    pre = ((x - plain.b_dec) @ plain.W_enc + plain.b_enc).detach().numpy()[:, 8:]
    kept = np.where(np.argsort(np.argsort(-pre, axis=1), axis=1) < 3, np.maximum(pre, 0), 0)
    auxiliary = ((error - kept @ plain.W_dec.detach().numpy()[8:]) ** 2).sum(1).mean()
    expected = (error**2).sum(1).mean() + 0.25 * auxiliary
    np.testing.assert_allclose(loss_of(sae, x).loss.item(), expected, rtol=1e-5)


def test_counters_restart_when_a_feature_fires():
    sae = sae_with_dead_features(0.1)
    sae.steps_since_fired[:] = 7
    step = loss_of(sae, torch.randn(64, 6, generator=torch.Generator().manual_seed(3)))
    sae.after_step(step)
    fired = step.entries.firings(step.values) > 0
    assert (sae.steps_since_fired[fired] == 0).all()
    assert (sae.steps_since_fired[~fired] == 8).all()
