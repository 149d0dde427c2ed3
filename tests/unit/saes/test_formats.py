"""Folders of other libraries: codes and reconstructions are the library's formula, written out here."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from universality.errors import StudyError
from universality.saes.folder import save_sae
from universality.saes.load import load_sae, load_with_metadata

D, F, K = 6, 20, 3


def rand(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape)))


X, W_E, W_D, B_E, B_D = rand(40, D), rand(D, F, seed=1), rand(F, D, seed=2), 0.3 * rand(F, seed=3), rand(D, seed=4)
T = rand(F, seed=5).abs()


def top_k(values: torch.Tensor, by: torch.Tensor | None = None) -> torch.Tensor:
    """relu of the values, at the K largest of `by` in each row."""
    kept = torch.zeros_like(values).scatter(1, (values if by is None else by).topk(K, dim=1).indices, 1.0)
    return torch.relu(values) * kept


def check(folder, codes, y_hat, x=X) -> None:
    """By dense and by sparse arithmetic, from the folder and from its import."""
    sae, metadata = load_with_metadata(folder)
    assert not sae.training
    save_sae(sae, folder / "imported", metadata)
    for read in (sae, load_sae(folder / "imported")):
        torch.testing.assert_close(read.encode(x), codes, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(read(x), y_hat, rtol=1e-4, atol=1e-4)
        pattern, values = read.encode_sparse(x)
        dense = torch.zeros(len(x), F)
        dense[np.repeat(np.arange(len(x)), np.diff(pattern.starts)), pattern.index] = values
        torch.testing.assert_close(dense, codes, rtol=1e-4, atol=1e-5)
    assert 0 < float((codes > 0).float().mean()) < 1


# dictionary_learning

LINEAR = {"encoder.weight": W_E.T.contiguous(), "decoder.weight": W_D.T.contiguous()}
PLAIN = {"W_enc": W_E, "W_dec": W_D, "b_enc": B_E, "b_dec": B_D}
TRAINER = {"activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "EleutherAI/pythia-70m", "k": K}
CENTRED = (X - B_D) @ W_E + B_E
GATES = {"gate_bias": B_E, "mag_bias": rand(F, seed=8), "r_mag": 0.3 * rand(F, seed=9), "decoder_bias": B_D}
DICTIONARY_LEARNING = {
    "AutoEncoder": (LINEAR | {"encoder.bias": B_E, "bias": B_D}, torch.relu(CENTRED)),
    "AutoEncoderNew": (LINEAR | {"encoder.bias": B_E, "decoder.bias": B_D}, torch.relu(X @ W_E + B_E)),
    "GatedAutoEncoder": (
        LINEAR | GATES,
        (CENTRED > 0) * torch.relu((X - B_D) @ W_E * GATES["r_mag"].exp() + GATES["mag_bias"]),
    ),
    "JumpReluAutoEncoder": (PLAIN | {"threshold": T}, (X @ W_E + B_E) * (X @ W_E + B_E > T)),
    "AutoEncoderTopK": (
        LINEAR | {"encoder.bias": B_E, "b_dec": B_D, "k": torch.tensor(K), "threshold": torch.tensor(-1.0)},
        top_k(CENTRED),
    ),
    "BatchTopKSAE": (
        LINEAR | {"encoder.bias": B_E, "b_dec": B_D, "k": torch.tensor(K), "threshold": torch.tensor(0.7)},
        CENTRED * (CENTRED > 0.7),
    ),
    "MatryoshkaBatchTopKSAE": (
        PLAIN | {"k": torch.tensor(K), "threshold": torch.tensor(0.4), "group_sizes": torch.tensor([5, F - 5])},
        CENTRED * (CENTRED > 0.4),
    ),
}


def dictionary_learning_folder(folder, kind, **trainer):
    folder.mkdir(exist_ok=True)
    config = {"trainer": TRAINER | {"dict_class": kind} | trainer, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(DICTIONARY_LEARNING[kind][0], folder / "ae.pt")
    return folder


@pytest.mark.parametrize("kind", DICTIONARY_LEARNING)
def test_dictionary_learning(kind, tmp_path):
    codes = DICTIONARY_LEARNING[kind][1]
    check(dictionary_learning_folder(tmp_path, kind), codes, codes @ W_D + B_D)


def test_what_dictionary_learning_tells(tmp_path):
    metadata = load_with_metadata(dictionary_learning_folder(tmp_path, "AutoEncoder"))[1]
    expected = {"model_name": "EleutherAI/pythia-70m", "hook_name": "blocks.3.hook_resid_post", "context_size": 128}
    assert metadata.items() >= (expected | {"format": "dictionary_learning"}).items()
    folder = dictionary_learning_folder(tmp_path, "AutoEncoder", submodule_name="mlp_out_layer_3")
    assert load_with_metadata(folder)[1]["hook_name"] == "mlp_out_layer_3"


# sparsify


def sparsify_folder(folder, skip=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    cfg = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": K}
    cfg |= {"multi_topk": False, "skip_connection": skip is not None, "transcode": False, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))
    tensors = {"encoder.weight": W_E.T.contiguous(), "encoder.bias": B_E, "W_dec": W_D, "b_dec": B_D}
    save_file(tensors | ({} if skip is None else {"W_skip": skip}), folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [None, rand(D, D, seed=6)])
def test_sparsify(transcode, skip, tmp_path):
    codes = top_k(X @ W_E + B_E if transcode else CENTRED)
    y_hat = codes @ W_D + B_D + (0 if skip is None else X @ skip.T)
    check(sparsify_folder(tmp_path, skip, transcode=transcode), codes, y_hat)


@pytest.mark.parametrize("place", ["gpt_neox.layers.5", "layers.5/seed1"])
def test_what_a_run_of_sparsify_tells(place, tmp_path):
    folder = sparsify_folder(tmp_path / place)
    run = {"sae": {}, "model": "EleutherAI/pythia-160m", "dataset": "the pile", "ctx_len": 2048}
    (tmp_path / "config.json").write_text(json.dumps(run))
    metadata = load_with_metadata(folder)[1]
    assert metadata == {
        "model_name": "EleutherAI/pythia-160m",
        "dataset_path": "the pile",
        "context_size": 2048,
        "hook_name": "blocks.5.hook_resid_post",
        "hf_hook_name": place.split("/")[0],
        "format": "sparsify",
    }


# OpenMOSS

IN, OUT = "blocks.2.hook_resid_post", "blocks.2.hook_mlp_out"
NORMS = {IN: 5.0, OUT: 0.7}
DECODER_NORMS = W_D.norm(dim=1)


def openmoss_folder(folder, tensors=None, **changes):
    config = {"sae_type": "sae", "d_model": D, "expansion_factor": F / D, "act_fn": "relu", "top_k": K}
    config |= {"hook_point_in": IN, "hook_point_out": IN, "use_decoder_bias": True, "norm_activation": "inference"}
    config |= {"sparsity_include_decoder_norm": True, "use_glu_encoder": False} | changes
    (folder / "config.json").write_text(json.dumps(config))
    stored = {"W_E": W_E, "b_E": B_E, "W_D": W_D, "b_D": B_D}
    stored |= {f"dataset_average_activation_norm.{name}": torch.tensor(norm) for name, norm in NORMS.items()}
    save_file(stored | (tensors or {}), folder / "sae_weights.safetensors")
    return folder


def activated(act_fn: str, pre: torch.Tensor, by_norm: bool) -> torch.Tensor:
    """Codes, as its encode has them: what the scaled pre-activation gates is scaled back."""
    scale = DECODER_NORMS if by_norm else torch.ones(F)
    gated = {"relu": torch.relu, "jumprelu": lambda p: p * (p > T), "topk": top_k}[act_fn](pre * scale)
    return gated / scale


@pytest.mark.parametrize("out", [IN, OUT])
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("norm_activation", ["dataset-wise", "inference"])
def test_openmoss(act_fn, by_norm, out, norm_activation, tmp_path):
    scales = [D**0.5 / NORMS[site] if norm_activation == "dataset-wise" else 1.0 for site in (IN, out)]
    codes = activated(act_fn, scales[0] * X @ W_E + B_E, by_norm)
    settings = {"act_fn": act_fn, "sparsity_include_decoder_norm": by_norm, "norm_activation": norm_activation}
    thresholds = {"activation_function.log_jumprelu_threshold": T.log()} if act_fn == "jumprelu" else {}
    folder = openmoss_folder(tmp_path, thresholds, hook_point_out=out, **settings)
    check(folder, codes, (codes @ W_D + B_D) / scales[1])


@pytest.mark.parametrize("act_fn", ["relu", "topk"])
def test_openmoss_scales_each_token(act_fn, tmp_path):
    scale = D**0.5 / X.norm(dim=1, keepdim=True)
    codes = activated(act_fn, scale * X @ W_E + B_E, True)
    folder = openmoss_folder(tmp_path, act_fn=act_fn, norm_activation="token-wise", use_decoder_bias=False)
    check(folder, codes, codes @ W_D / scale)


@pytest.mark.parametrize("act_fn", ["jumprelu", "topk"])
def test_openmoss_with_decoder_rows_of_one_norm(act_fn, tmp_path):
    """A TopK SAE is then one that sae-lens knows; thresholds are divided by the norm all the same."""
    rows = 2 * W_D / DECODER_NORMS[:, None]
    pre = X @ W_E + B_E
    codes = top_k(pre) if act_fn == "topk" else pre * (2 * pre > T)
    thresholds = {"activation_function.log_jumprelu_threshold": T.log()} if act_fn == "jumprelu" else {}
    folder = openmoss_folder(tmp_path, thresholds | {"W_D": rows}, act_fn=act_fn)
    check(folder, codes, codes @ rows + B_D)
    assert load_sae(folder).architecture == act_fn


def test_what_openmoss_tells(tmp_path):
    metadata = load_with_metadata(openmoss_folder(tmp_path, hook_point_out=OUT))[1]
    expected = {"hook_name": IN, "hook_name_out": OUT, "format": "openmoss"}
    assert metadata.items() >= expected.items()


# sae-lens


def sae_lens_folder(folder, stored_as=torch.float32, extra=None, **cfg):
    base = {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "apply_b_dec_to_input": True}
    (folder / "cfg.json").write_text(json.dumps(base | cfg))
    tensors = {name: tensor.to(stored_as) for name, tensor in (PLAIN | (extra or {})).items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def test_sae_lens_before_version_6(tmp_path):
    cfg = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    cfg |= {"hook_point": IN, "model_name": "gpt2-small", "sae_lens_version": "3.9.1", "normalize_activations": False}
    folder = sae_lens_folder(tmp_path, extra={"scaling_factor": torch.ones(F)}, **cfg)
    codes = top_k(CENTRED)
    check(folder, codes, codes @ W_D + B_D)
    metadata = load_with_metadata(folder)[1]
    assert metadata == {"hook_name": IN, "model_name": "gpt2-small", "sae_lens_training_version": "3.9.1"}


def test_sae_lens_in_bfloat16_and_of_heads(tmp_path):
    folder = sae_lens_folder(tmp_path, torch.bfloat16, dtype="bfloat16", reshape_activations="hook_z", metadata={})
    W_enc, W_dec, b_enc, b_dec = (PLAIN[name].bfloat16().float() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    codes = top_k((X - b_dec) @ W_enc + b_enc)
    check(folder, codes, codes @ W_dec + b_dec)


def test_a_transcoder_of_normalised_inputs_undoes_nothing(tmp_path):
    skip = rand(D, D, seed=6)
    cfg = {"architecture": "skip_transcoder", "normalize_activations": "layer_norm", "apply_b_dec_to_input": False}
    folder = sae_lens_folder(tmp_path, extra={"W_skip": skip}, d_out=D, metadata={}, **cfg)
    x = X - X.mean(1, keepdim=True)
    codes = torch.relu(x / (x.std(1, keepdim=True) + 1e-5) @ W_E + B_E)
    check(folder, codes, codes @ W_D + B_D + X @ skip.T)


# Folders that cannot be read


def without(folder, name: str):
    (folder / name).unlink()
    return folder


def overwritten(folder, name: str, content: bytes):
    (folder / name).write_bytes(content)
    return folder


DL, SL, OM = dictionary_learning_folder, sae_lens_folder, openmoss_folder
REFUSED = [
    (lambda f: f, "is no folder of a dictionary; known formats: sae-lens: cfg.json and sae_weights.safetensors; dict"),
    (lambda f: without(SL(f), "sae_weights.safetensors"), "is no folder of a dictionary"),
    (lambda f: SL(f, architecture="abstopk"), "SAE architecture 'abstopk' cannot be read: its codes can be negative"),
    (lambda f: SL(f, architecture="temporal"), "SAE architecture 'temporal' cannot be read"),
    (lambda f: SL(f, architecture="matching_pursuit"), "SAE architecture 'matching_pursuit' cannot be read"),
    (lambda f: SL(f, normalize_activations="covariance_whitening"), "'covariance_whitening' cannot be read; allowed: "),
    (
        lambda f: SL(f, reshape_activations="hook_q"),
        "reshape_activations 'hook_q' cannot be read; allowed: none, hook_z",
    ),
    (lambda f: SL(f, activation_fn_str="tanh-relu"), "activation_fn 'tanh-relu' cannot be read; allowed: relu, topk"),
    (
        lambda f: SL(f, extra={"scaling_factor": T}),
        "scaling_factor is no tensor of a topk dictionary: W_enc, W_dec, b_dec",
    ),
    (lambda f: SL(f, k=F + 1), f"k {F + 1} is no number from 1 to d_sae={F}"),
    (lambda f: overwritten(SL(f), "sae_weights.safetensors", b"x"), "sae_weights.safetensors: not a readable"),
    (lambda f: overwritten(DL(f, "AutoEncoder"), "config.json", b"{}"), "config.json: lacks 'trainer'"),
    (
        lambda f: DL(f, "AutoEncoder", dict_class="IdentityDict"),
        "dict_class 'IdentityDict' cannot be read; allowed: Auto",
    ),
    (lambda f: DL(f, "AutoEncoder", dict_class="AutoEncoderTopK"), "ae.pt: lacks the tensor 'b_dec'; it has bias, "),
    (lambda f: DL(f, "AutoEncoder", dict_size=F + 1), f"W_enc should have shape ({D}, {F + 1}), found ({D}, {F})"),
    (lambda f: overwritten(DL(f, "AutoEncoder"), "ae.pt", b"x"), "ae.pt: not a readable file of tensors"),
    (lambda f: sparsify_folder(f, activation="groupmax"), "activation 'groupmax' cannot be read; allowed: topk"),
    (lambda f: sparsify_folder(f, skip_connection=True), "sae.safetensors: lacks the tensor 'W_skip'"),
    (lambda f: OM(f, act_fn="batchtopk"), "act_fn 'batchtopk' cannot be read; allowed: relu, jumprelu, topk"),
    (lambda f: OM(f, act_fn="jumprelu"), "log_jumprelu_threshold', which act_fn 'jumprelu' needs"),
    (lambda f: OM(f, sae_type="clt"), "sae_type 'clt' cannot be read; allowed: 'sae'"),
    (
        lambda f: OM(f, norm_activation="batch-wise"),
        "norm_activation 'batch-wise' cannot be read; allowed: dataset-wise",
    ),
    (lambda f: OM(f, norm_activation="dataset-wise", hook_point_out="x"), "lacks 'dataset_average_activation_norm.x'"),
]


@pytest.mark.parametrize(("made", "message"), REFUSED)
def test_a_bad_folder_is_one_clear_line(made, message, tmp_path):
    with pytest.raises(StudyError) as error:
        load_sae(made(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_but_tensors_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    folder = dictionary_learning_folder(tmp_path, "AutoEncoder")
    torch.save({"encoder.weight": Evil()}, folder / "ae.pt")
    with pytest.raises(StudyError, match="ae.pt: not a readable file of tensors"):
        load_sae(folder)
    assert not (tmp_path / "pwned").exists()


def test_the_command_converts_a_folder(tmp_path):
    folder = sparsify_folder(tmp_path / "layers.5")
    command = [sys.executable, "-m", "universality.cli", "saes", "import", folder, "--out"]
    subprocess.run([*command, tmp_path / "out"], check=True)
    sae, metadata = load_with_metadata(tmp_path / "out")
    assert torch.equal(sae(X), load_sae(folder)(X))
    assert metadata["format"] == "sparsify"
    same = subprocess.run([*command, folder], capture_output=True, text=True)
    assert same.returncode == 1
    assert "is the folder that is read; name another one" in same.stderr
