"""What holds of every variant of a dictionary: sparse autoencoders, transcoders, crosscoders."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from tests.conftest import small_training, write_store
from universality.activations.batches import JoinedBatches, StoredBatches
from universality.activations.store import ActivationStore
from universality.errors import StudyError
from universality.kernels.hardware import has_bf16_products
from universality.saes.build import build_sae
from universality.saes.folder import read_frequencies, save_sae
from universality.saes.load import load_sae, load_with_metadata
from universality.saes.settings import (
    BatchTopKSettings,
    CrosscoderSettings,
    GatedSettings,
    JumpReLUSettings,
    MatryoshkaSettings,
    ReluL1Settings,
    TopKSettings,
    TranscoderSettings,
)
from universality.saes.training import Trainee, Wanted, _scaled, train_saes
from universality.settings import OnMismatch

AUX = {"k": 3, "k_aux": 8, "aux_coefficient": 0.03125}
VARIANTS = {
    "topk": TopKSettings(**AUX),
    "batchtopk": BatchTopKSettings(**AUX),
    "matryoshka": MatryoshkaSettings(**AUX, prefixes=[16, 40]),
    "relu_l1": ReluL1Settings(l1_coefficient=0.6),
    "jumprelu": JumpReLUSettings(l0_coefficient=0.3, bandwidth=0.5, initial_threshold=0.5),
    "gated": GatedSettings(l1_coefficient=2.0),
    "transcoder": TranscoderSettings(**AUX, input="resid_mid", target="mlp.out"),
    "skip_transcoder": TranscoderSettings(**AUX, input="resid_mid", target="mlp.out", skip=True),
    "crosscoder": CrosscoderSettings(**AUX),
    "frozen_topk": TopKSettings(**AUX, frozen_decoder=True),
    "frozen_relu_l1": ReluL1Settings(l1_coefficient=0.6, frozen_decoder=True),
}
D_IN, D_SAE, TRUE_FEATURES = 24, 48, 32


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


def widths(variant, d: int = D_IN) -> list[int]:
    return [d, d + 1] if isinstance(variant, TranscoderSettings | CrosscoderSettings) else [d]


def planted(n_rows: int, seed: int = 0, d: int = D_IN) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are sums of three of 32 unit directions, and those directions [32, d]."""
    directions = np.random.default_rng(d).standard_normal((TRUE_FEATURES, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rng, codes = np.random.default_rng(seed), np.zeros((n_rows, TRUE_FEATURES))
    for row in codes:
        row[rng.choice(TRUE_FEATURES, 3, replace=False)] = 1 + rng.random(3)
    return (codes @ directions).astype(np.float32), directions


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two sites whose values share their codes, in stores as the cache writes them."""
    folder = tmp_path_factory.mktemp("planted")
    values = [torch.from_numpy(planted(8000, d=d)[0]) for d in (D_IN, D_IN + 1)]
    shards = [write_store(folder / f"{n}", v, [8000], site=f"resid_post.{n}") for n, v in enumerate(values)]
    return [StoredBatches(ActivationStore(s)) for s in shards]


@pytest.fixture
def batches(stores, variant):
    return JoinedBatches(stores) if len(widths(variant)) == 2 else stores[0]


def train(batches, variant, out, seed=0, on_mismatch=OnMismatch.refuse, **changes):
    checkpoint = out.parent / f"{out.name}.pt"
    train_saes(batches, [Wanted(variant, seed, out)], small_training(**changes), checkpoint, on_mismatch)
    return load_sae(out)


def test_training_recovers_planted_features(batches, variant, tmp_path):
    if variant.frozen_decoder:
        pytest.skip("its directions are random")
    sae = train(batches, variant, tmp_path / "sae", steps=900, checkpoint_steps=1000)
    inputs = [torch.from_numpy(planted(2000, seed=1, d=d)[0]) for d in widths(variant)]
    x, target = inputs if isinstance(variant, TranscoderSettings) else (torch.cat(inputs, 1),) * 2
    error = (target - sae(x)).square().sum() / (target - target.mean(0)).square().sum()
    assert float(error) < 0.1
    if getattr(variant, "skip", False):
        return  # with fewer inputs than features, a linear map gives much of the target; features get the rest
    for part in sae.W_dec.split(widths(variant)[sae.d_out == D_IN + 1 :], dim=1):
        learned = torch.nn.functional.normalize(part, dim=1)
        cosines = torch.from_numpy(planted(1, d=part.shape[1])[1]).float() @ learned.T
        assert float(cosines.max(dim=1).values.mean()) > 0.9


def test_memory_first_used_without_gradients_serves_training_too(batches, variant, tmp_path, monkeypatch):
    sae = random_sae(variant, D_IN, d_sae=48).eval()
    alone = train(batches, variant, tmp_path / "alone", steps=2).state_dict()
    monkeypatch.setattr("universality.saes.base._MEMORY", {})
    with torch.inference_mode():
        sae.encode_sparse(torch.randn(300, sae.d_in))
    after = train(batches, variant, tmp_path / "after", steps=2).state_dict()
    assert all(torch.equal(after[name], value) for name, value in alone.items())


def random_sae(variant, d: int = 12, d_sae: int = 40, seed: int = 0):
    """In training, with no parameter at a special value, some features dead."""
    torch.manual_seed(seed)
    if isinstance(variant, MatryoshkaSettings):
        variant = variant.model_copy(update={"prefixes": [d_sae // 3, d_sae // 2]})
    sae = build_sae(variant, d_sae, widths(variant, d)).train()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim < 2 else 0.4))
        if "log_threshold" in dict(sae.named_parameters()):
            sae.log_threshold.copy_(torch.full((d_sae,), 0.5).log() + 0.1 * torch.randn(d_sae))
    sae.dead_steps = 10
    sae.steps_since_fired[::3] = 10
    return sae


def random_batch(variant, n: int = 64, d: int = 12, dtype=torch.float32):
    parts = [torch.randn(n, width, dtype=dtype) for width in widths(variant, d)]
    return parts if isinstance(variant, TranscoderSettings) else [torch.cat(parts, 1)] * 2


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_sparse_arithmetic_gives_the_dense_loss_and_gradients(variant, frozen):
    """Autograd on the plain dense formula is the reference, the auxiliary loss included."""
    if frozen and isinstance(variant, CrosscoderSettings):
        pytest.skip("settings refuse it")
    variant = variant.model_copy(update={"frozen_decoder": frozen})
    sae = random_sae(variant)
    x, target = random_batch(variant)
    seen = {}
    for name, entries in (("dense", sae.dense_entries), ("sparse", sae.sparse_entries)):
        sae.zero_grad()
        step = sae.loss(x, target, entries(x), 0.7)
        step.loss.backward()
        gradients = {key: p.grad.clone() for key, p in sae.named_parameters() if p.requires_grad}
        assert frozen == ("W_dec" not in gradients) == (sae.W_dec.grad is None)
        seen[name] = (step.loss.detach(), step.x_hat.detach(), step.entries.firings(step.values), gradients)
    assert float(seen["dense"][0]) > 0
    for dense, sparse in zip(seen["dense"][:3], seen["sparse"][:3], strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
    for key, expected in seen["dense"][3].items():
        assert expected.abs().sum() > 0, key
        torch.testing.assert_close(
            seen["sparse"][3][key], expected, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_rounded_products_change_the_loss_by_rounding(variant):
    if not has_bf16_products("cpu"):
        pytest.skip("this CPU has no bfloat16 products")
    sae = random_sae(variant)
    x, target = random_batch(variant)
    with torch.no_grad():
        exact = sae.loss(x, target, sae.sparse_entries(x), 0.7).loss
        sae.products = "bfloat16"
        for entries in (sae.sparse_entries, sae.dense_entries):
            torch.testing.assert_close(sae.loss(x, target, entries(x), 0.7).loss, exact, rtol=0.02, atol=0.0)


def test_without_the_instructions_for_it_nothing_is_rounded(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("universality.saes.training.has_bf16_products", lambda device: False)
    for name, products in (("plain", "float32"), ("asked", "bfloat16")):
        train(stores[0], VARIANTS["topk"], tmp_path / name, steps=5, products=products)
    assert files(tmp_path / "plain") == files(tmp_path / "asked")


def test_a_frozen_decoder_stays_at_its_random_directions(batches, variant, tmp_path):
    """To the last bit, while all else learns and more is explained; where dead features begin anew, too."""
    if isinstance(variant, CrosscoderSettings):
        pytest.skip("settings refuse it")
    frozen = {"frozen_decoder": True} | ({"resample_steps": 50} if hasattr(variant, "resample_steps") else {})
    wanted = Wanted(variant.model_copy(update=frozen), 3, tmp_path / "sae")
    trainee = Trainee(wanted, small_training(steps=300), _scaled(batches))
    sae = trainee.sae
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae))
    assert "m.W_dec" not in trainee.adam.state()
    for number, rows in enumerate(islice(batches.batches(256, 0), 300)):
        trainee.step(rows * trainee.scaled.factors, number)
    assert torch.equal(sae.W_dec, before["W_dec"])
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, before[name]) == (name == "W_dec"), name
    explained = trainee.curves.columns["explained_variance"]
    assert explained[-1] > explained[0] + 0.05
    trainee.save([{"model_name": "m", "hook_name": "s"}] * 2)
    loaded, metadata = load_with_metadata(tmp_path / "sae")
    assert metadata["variant"]["frozen_decoder"] is True
    assert torch.equal(loaded.W_dec, before["W_dec"] / trainee.scaled.factors[trainee.written])


class LossOnly(torch.nn.Module):
    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x, target):
        return self.sae.loss(x, target, self.sae.dense_entries(x), 0.5).loss


def test_gradients_are_those_of_the_loss(variant):
    """By finite differences in float64; what is held constant on purpose is out of the way: the target of the auxiliary
    loss, the frozen decoder of a gate; a JumpReLU's estimated gradients are no true ones."""
    if isinstance(variant, JumpReLUSettings | GatedSettings):
        pytest.skip("its gradient is by design not that of the loss; tests/unit/saes has its formula")
    module = LossOnly(random_sae(variant, d=5, d_sae=9)).double()
    module.sae.steps_since_fired[:] = 0
    x, target = random_batch(variant, n=4, d=5, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in module.parameters())
    assert torch.autograd.gradcheck(
        lambda *given: torch.func.functional_call(module, dict(zip(names, given, strict=True)), (x, target)), values
    )


def test_same_seed_same_bytes_other_seed_other_bytes(batches, variant, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(batches, variant, tmp_path / name, seed, steps=20)
    one, two, three = ((tmp_path / n / "sae_weights.safetensors").read_bytes() for n in ("one", "two", "three"))
    assert one == two != three


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_several_from_one_pass_are_what_each_is_alone(batches, variant, tmp_path):
    wider = variant.model_copy(update={"d_sae": 64, "learning_rate": 0.001})
    wanted = [Wanted(variant, 0, tmp_path / "a"), Wanted(wider, 0, tmp_path / "b"), Wanted(variant, 1, tmp_path / "c")]
    train_saes(batches, wanted, small_training(steps=15), tmp_path / "state.pt")
    for one in wanted:
        alone = one._replace(out=one.out.with_name(one.out.name + "_alone"))
        train_saes(batches, [alone], small_training(steps=15), tmp_path / "state.pt")
        assert files(one.out) == files(alone.out)
    assert load_sae(tmp_path / "b").d_sae == 64


class Killed(Exception):
    pass


def test_an_interrupted_training_ends_with_the_same_bytes(batches, variant, tmp_path, monkeypatch):
    if hasattr(variant, "resample_steps"):
        variant = variant.model_copy(update={"resample_steps": 7})
    steps = {"steps": 35, "dead_steps": 4, "log_steps": 3}
    train(batches, variant, tmp_path / "whole", **steps)
    left = [27]

    def killed_after(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return step(self, *arguments)

    step = Trainee.step
    monkeypatch.setattr(Trainee, "step", killed_after)
    with pytest.raises(Killed):
        train(batches, variant, tmp_path / "cut", **steps)
    monkeypatch.undo()
    assert (tmp_path / "cut.pt").exists()
    assert not (tmp_path / "cut").exists()
    with pytest.raises(StudyError, match=r"cut\.pt: was made from other saes\.training\.learning_rate; remove it"):
        train(batches, variant, tmp_path / "cut", learning_rate=0.001, **steps)
    counted = []
    monkeypatch.setattr(Trainee, "step", lambda self, *a: (counted.append(a[1]), step(self, *a))[1])
    train(batches, variant, tmp_path / "cut", **steps)
    assert counted == list(range(20, 35))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert not (tmp_path / "cut.pt").exists()


def test_the_folder_tells_how_often_features_fired_in_the_last_tenth(batches, variant, tmp_path):
    sae = train(batches, variant, tmp_path / "sae", steps=400, checkpoint_steps=1000)
    told = read_frequencies(tmp_path / "sae")
    inputs = [torch.from_numpy(planted(8000, d=d)[0]) for d in widths(variant)]
    x = inputs[0] if isinstance(variant, TranscoderSettings) else torch.cat(inputs, 1)
    found = (sae.encode(x) > 0).float().mean(0)
    assert float((told - found).abs().mean()) < 0.25 * float(found.mean())


def test_a_crosscoders_norms_are_compared_in_units_of_each_site():
    crosscoder = random_sae(VARIANTS["crosscoder"])
    norms = crosscoder.site_norms()
    factors = torch.tensor([3.0, 0.25]).repeat_interleave(torch.tensor([12, 13]))
    crosscoder.rescale(factors, factors)
    assert crosscoder.scales == [3.0, 0.25]
    torch.testing.assert_close(crosscoder.site_norms(), norms)


def test_a_folder_is_read_as_it_was_written(batches, variant, tmp_path):
    """Codes and reconstructions of the folder alone are those of what was trained."""
    sae = random_sae(variant).eval()
    if hasattr(sae, "threshold") and isinstance(sae.threshold, torch.Tensor):
        sae.threshold.fill_(0.3)
    sae.scales = [1.0, 2.0]
    frequencies = torch.rand(sae.d_sae).round(decimals=1)
    save_sae(sae, tmp_path / "sae", {"hook_name": "resid_post.0"}, None, frequencies)
    loaded, metadata = load_with_metadata(tmp_path / "sae")
    assert metadata["hook_name"] == "resid_post.0"
    torch.testing.assert_close(read_frequencies(tmp_path / "sae"), frequencies)
    if isinstance(variant, CrosscoderSettings):
        torch.testing.assert_close(loaded.site_norms(), sae.site_norms())
    x = random_batch(variant)[0]
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(loaded(x), sae(x))
    pattern, values = loaded.encode_sparse(x)
    dense = torch.zeros(len(x), sae.d_sae)
    dense[np.repeat(np.arange(len(x)), np.diff(pattern.starts)), pattern.index] = values
    torch.testing.assert_close(dense, sae.encode(x), rtol=1e-5, atol=1e-6)
    assert (dense > 0).sum() > len(x)


def test_bad_input_is_one_clear_error(batches, variant, tmp_path):
    with pytest.raises(StudyError, match=r"batch_size: 9000 is more than the 8000 rows of resid_post\.0"):
        train(batches, variant, tmp_path / "sae", batch_size=9000)
    with pytest.raises(StudyError, match="loss at step"):
        train(batches, variant, tmp_path / "sae", learning_rate=1e38, steps=5)
    with pytest.raises(StudyError, match=f"{variant.architecture}: is of .* sites?.*, but 0 were given"):
        build_sae(variant, 64, [])
    with pytest.raises(StudyError, match="but 1 were given" if len(widths(variant)) == 2 else "but 2 were given"):
        build_sae(variant, 64, [4] if len(widths(variant)) == 2 else [4, 4])
    if hasattr(variant, "k"):
        with pytest.raises(StudyError, match=f"{variant.architecture} k: 3 is more than d_sae=2"):
            build_sae(variant, 2, widths(variant, 4))
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize(("spoilt", "message"), [(float("nan"), "not finite"), (None, "is the same at every token")])
def test_useless_activations_are_named(tmp_path, spoilt, message):
    values = torch.ones(600, D_IN)
    if spoilt is not None:
        values[3, 5] = spoilt
    batches = StoredBatches(ActivationStore(write_store(tmp_path / "store", values, [600])))
    with pytest.raises(StudyError, match=rf"m resid_post\.0: .*{message}"):
        train(batches, VARIANTS["topk"], tmp_path / "sae")


def test_a_damaged_folder_is_named(batches, variant, tmp_path):
    train(batches, variant, tmp_path / "sae", steps=2)
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(cfg | {"d_sae": 7}))
    with pytest.raises(StudyError, match=r"W_enc should have shape \(\d+, 7\), found \(\d+, 48\)"):
        load_sae(tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(cfg | {"architecture": "mystery"}))
    with pytest.raises(StudyError, match="unknown SAE architecture 'mystery'; allowed: standard, topk, "):
        load_sae(tmp_path / "sae")
