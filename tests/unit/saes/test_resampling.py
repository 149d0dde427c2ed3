import pytest
import torch

from tests.conftest import small_training, write_store
from universality.activations.batches import StoredBatches
from universality.activations.store import ActivationStore
from universality.saes.build import build_sae
from universality.saes.resampling import ResampledSAE
from universality.saes.settings import GatedSettings, JumpReLUSettings, ReluL1Settings
from universality.saes.standard import StandardSAE
from universality.saes.training import Wanted, train_saes


def test_dead_features_take_the_directions_of_what_is_badly_reconstructed():
    sae = StandardSAE(8, 20, ReluL1Settings(l1_coefficient=1.0, resample_steps=10)).train()
    sae.initialise(torch.zeros(8), torch.Generator().manual_seed(0))
    sae.dead_steps = 5
    dead = torch.tensor([3, 11, 19])
    sae.steps_since_fired[dead] = 5
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    target = x.clone()
    target[:60] *= 1e-4  # four inputs have all the loss, the others almost none
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


def test_with_a_frozen_decoder_the_encoder_begins_anew_along_the_features_own_direction():
    variant = ReluL1Settings(l1_coefficient=1.0, resample_steps=10, frozen_decoder=True)
    sae = build_sae(variant, 20, [8]).train()
    sae.initialise(torch.zeros(8), torch.Generator().manual_seed(0))
    sae.dead_steps = 5
    dead = torch.tensor([3, 11, 19])
    sae.steps_since_fired[dead] = 5
    sae.W_enc.data += torch.randn(8, 20, generator=torch.Generator().manual_seed(1))
    sae.b_enc.data -= 1
    before = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    step = sae.loss(x, x, sae.dense_entries(x), 1.0)
    assert torch.equal(sae.resample(x, step, torch.Generator().manual_seed(3)), dead)
    assert torch.equal(sae.W_dec, before["W_dec"])
    alive = torch.ones(20, dtype=torch.bool)
    alive[dead] = False
    norm = 0.2 * before["W_enc"][:, alive].norm(dim=0).mean()
    torch.testing.assert_close(sae.W_enc[:, dead], norm * sae.W_dec[dead].T)
    assert torch.equal(sae.W_enc[:, alive], before["W_enc"][:, alive])
    assert (sae.b_enc[dead] == 0).all()


def test_nothing_is_resampled_where_nothing_or_everything_is_dead():
    sae = StandardSAE(8, 20, ReluL1Settings(l1_coefficient=1.0)).train()
    sae.dead_steps = 5
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    step = sae.loss(x, x, sae.sparse_entries(x), 1.0)
    for since in (0, 5):
        sae.steps_since_fired[:] = since
        assert len(sae.resample(x, step, torch.Generator())) == 0


VARIANTS = [
    ReluL1Settings(l1_coefficient=1.0, resample_steps=20),
    GatedSettings(l1_coefficient=1.0, resample_steps=20),
    JumpReLUSettings(l0_coefficient=1.0, bandwidth=0.5, initial_threshold=0.5, resample_steps=20),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.architecture)
def test_every_one_begins_differently_and_with_nothing_of_what_it_was(variant):
    torch.manual_seed(0)
    sae = build_sae(variant, 40, [8]).train()
    assert isinstance(sae, ResampledSAE)
    for parameter in sae.parameters():
        parameter.data += torch.randn_like(parameter)
    sae.dead_steps = 5
    dead = torch.arange(10, 40)
    sae.steps_since_fired[dead] = 5
    x = torch.randn(64, 8)
    x[:3] *= 100  # nearly all of the loss
    step = sae.loss(x, x, sae.dense_entries(x), 1.0)
    found = sae.resample(x, step, torch.Generator().manual_seed(2))
    assert torch.equal(found, dead)
    cosines = torch.nn.functional.normalize(sae.W_dec[dead]) @ torch.nn.functional.normalize(sae.W_dec[dead]).T
    assert float((cosines - torch.eye(30)).max()) < 0.99999
    for name, value in sae.at_the_start().items():
        assert torch.equal(getattr(sae, name)[dead], torch.full((30,), value))
    numbers_of_features = {name for name, p in sae.named_parameters() if p.shape == (40,)}
    assert sae.at_the_start().keys() == numbers_of_features


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.architecture)
def test_nothing_is_resampled_once_the_learning_rate_falls(variant, tmp_path, monkeypatch):
    """What is saved is what was trained, not what has just begun anew."""
    values = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    batches = StoredBatches(ActivationStore(write_store(tmp_path / "store", values, [600])))
    resampled, resample = [], ResampledSAE.resample

    def noted(self, target, step, generator):
        resampled.append(int(self.rows_seen))
        return resample(self, target, step, generator)

    monkeypatch.setattr(ResampledSAE, "resample", noted)
    training = small_training(steps=100, decay_fraction=0.3, batch_size=64, dead_steps=10)
    train_saes(batches, [Wanted(variant, 0, tmp_path / "sae")], training, tmp_path / "state")
    assert resampled == [64 * steps for steps in (20, 40, 60)]
