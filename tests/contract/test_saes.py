"""What holds of every SAE variant."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import write_store
from universality.activations.batches import StoredBatches
from universality.activations.store import ActivationStore
from universality.errors import StudyError
from universality.saes.settings import ReluL1Settings, SAETraining, TopKSettings
from universality.saes.training import train_sae
from universality.saes.variants import build_sae, load_sae

VARIANTS = {
    "topk": TopKSettings(k=3, k_aux=8, aux_coefficient=0.03125, dead_steps=20),
    "relu_l1": ReluL1Settings(l1_coefficient=0.6),
}
D_IN, D_SAE, TRUE_FEATURES = 24, 48, 32


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


def training(**changes) -> SAETraining:
    values = {"d_sae": D_SAE, "learning_rate": 0.004, "batch_size": 256, "steps": 1500, "warmup_steps": 50}
    return SAETraining(**values | {"decay_fraction": 0.3} | changes)


def planted(n_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are sums of three of 32 unit directions, and those directions [32, D_IN]."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((TRUE_FEATURES, D_IN))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    codes = np.zeros((n_rows, TRUE_FEATURES))
    for row in codes:
        row[rng.choice(TRUE_FEATURES, 3, replace=False)] = 1 + rng.random(3)
    return (codes @ directions).astype(np.float32), directions


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """Activations with planted features, in a store as the cache writes it."""
    values, _ = planted(8000)
    shards = write_store(tmp_path_factory.mktemp("planted"), torch.from_numpy(values), [8000])
    return StoredBatches(ActivationStore(shards))


def test_training_recovers_planted_features(batches, variant, tmp_path):
    train_sae(batches, variant, training(), 0, tmp_path / "sae")
    sae = load_sae(tmp_path / "sae")
    learned = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    cosines = torch.from_numpy(planted(1)[1]).float() @ learned.T
    assert float(cosines.max(dim=1).values.mean()) > 0.9
    held_out = torch.from_numpy(planted(2000, seed=0)[0])
    error = (held_out - sae.decode(sae.encode(held_out))).square().sum() / (held_out - held_out.mean(0)).square().sum()
    assert float(error) < 0.1


def test_same_seed_same_bytes_other_seed_other_bytes(batches, variant, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train_sae(batches, variant, training(steps=20), seed, tmp_path / name)
    one, two, three = ((tmp_path / n / "sae_weights.safetensors").read_bytes() for n in ("one", "two", "three"))
    assert one == two != three


def test_the_folder_is_sae_lens_format(batches, variant, tmp_path):
    train_sae(batches, variant, training(steps=5), 0, tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert cfg["architecture"] == variant.architecture
    assert {"d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "metadata"} <= set(cfg)
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,),
    }  # fmt: skip
    # The stored weights alone, by the textbook formula, give the codes.
    x = torch.from_numpy(planted(50)[0])
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    expected = torch.relu(pre)
    if isinstance(variant, TopKSettings):
        kth = expected.sort(dim=1, descending=True).values[:, variant.k - 1 : variant.k]
        expected = torch.where(expected >= kth, expected, 0)
    torch.testing.assert_close(load_sae(tmp_path / "sae").encode(x), expected, rtol=1e-4, atol=1e-4)


class LossOnly(torch.nn.Module):
    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x):
        return self.sae.loss(x, 0.5)[0]


def test_gradients_are_those_of_the_loss(variant):
    """By finite differences in float64, with the auxiliary loss, whose target is held constant, out of the way."""
    if isinstance(variant, TopKSettings):
        variant = variant.model_copy(update={"dead_steps": 10**9})
    torch.manual_seed(0)
    module = LossOnly(build_sae(5, 9, variant)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    values = tuple(torch.randn_like(p).requires_grad_() for p in module.parameters())
    assert torch.autograd.gradcheck(
        lambda *parameters: torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,)), values
    )


def test_bad_input_is_one_clear_error(batches, variant, tmp_path):
    with pytest.raises(StudyError, match=r"batch_size: 9000 is more than the 8000 rows of resid_post\.0"):
        train_sae(batches, variant, training(batch_size=9000), 0, tmp_path / "sae")
    with pytest.raises(StudyError, match="loss at step"):
        train_sae(batches, variant, training(learning_rate=1e38), 0, tmp_path / "sae")
    with pytest.raises(StudyError, match="k=3 is more than"):
        build_sae(4, 2, VARIANTS["topk"])
    assert not (tmp_path / "sae").exists()


def test_a_damaged_folder_is_named(batches, variant, tmp_path):
    train_sae(batches, variant, training(steps=2), 0, tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(cfg | {"d_sae": 7}))
    with pytest.raises(StudyError, match=r"W_enc should have shape \(24, 7\), found \(24, 48\)"):
        load_sae(tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(cfg | {"architecture": "mystery"}))
    with pytest.raises(StudyError, match="unknown SAE architecture 'mystery'; allowed: topk, standard"):
        load_sae(tmp_path / "sae")
