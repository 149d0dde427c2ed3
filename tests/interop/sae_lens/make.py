"""Save dictionaries of random weights as their libraries save them: python make.py OUT

OUT/LIBRARY/NAME is the folder of each; OUT/LIBRARY/NAME.safetensors has inputs `x`, and the `codes` and `y_hat` that
the library gives for them. It imports nothing of the project, and runs in the environment of requirements.lock.
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

D, F, K, ROWS = 8, 24, 4, 64
IN, OUT = "blocks.3.hook_resid_post", "blocks.3.hook_mlp_out"


@torch.no_grad()
def randomised(module: torch.nn.Module) -> Any:
    """All parameters random; thresholds positive."""
    for name, parameter in module.named_parameters():
        parameter.normal_(std=1.0 if parameter.ndim == 1 else 0.5)
        if name.endswith("threshold") and "log" not in name:
            parameter.abs_()
    return module


def keep(folder: Path, x: torch.Tensor, codes: torch.Tensor, y_hat: torch.Tensor) -> None:
    tensors = {"x": x, "codes": codes, "y_hat": y_hat}
    save_file({name: t.detach().flatten(1).contiguous() for name, t in tensors.items()}, f"{folder}.safetensors")


# sae-lens


def keep_loaded(folder: Path, x: torch.Tensor) -> None:
    """What the saved folder is to sae-lens itself."""
    sae = SAE.load_from_disk(folder)
    keep(folder, x, sae.encode(x), sae(x))


def sae_lens_trained(out: Path) -> None:
    """Each training class, as its training saves it in the end."""
    own: dict[str, dict] = {name: {} for name in ("standard", "gated", "jumprelu")}
    own |= {name: {"k": K} for name in ("topk", "batchtopk")}
    own["matryoshka_batchtopk"] = {"k": K, "matryoshka_widths": [8, F]}
    normalisations = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")
    for name, centred, normalisation in itertools.product(own, (True, False), normalisations):
        for rescale in (True, False) if "topk" in name else (None,):
            kind, config = get_sae_training_class(name)
            settings = own[name] | ({} if rescale is None else {"rescale_acts_by_decoder_norm": rescale})
            settings |= {"apply_b_dec_to_input": centred, "normalize_activations": normalisation}
            sae = randomised(kind(config(d_in=D, d_sae=F, metadata=SAEMetadata(hook_name=IN), **settings)))
            if hasattr(sae, "topk_threshold"):
                sae.topk_threshold.fill_(0.8)
            folder = out / f"{name}_{'centred' if centred else 'plain'}_{normalisation}_{rescale}"
            sae.save_inference_model(folder)
            keep_loaded(folder, torch.randn(ROWS, D))


def sae_lens_others(out: Path) -> None:
    """Transcoders, and an SAE of attention heads, whose input is not flat there."""
    for skip, jump, normalisation in itertools.product(("", "skip_"), ("", "jumprelu_"), ("none", "layer_norm")):
        kind, config = get_sae_class(f"{jump}{skip}transcoder")
        settings = {"apply_b_dec_to_input": False, "normalize_activations": normalisation}
        sae = randomised(kind(config(d_in=D, d_out=D + 3, d_sae=F, **settings)))
        folder = out / f"{jump}{skip}transcoder_{normalisation}"
        sae.save_model(folder)
        keep_loaded(folder, torch.randn(ROWS, D))
    kind, config = get_sae_training_class("topk")
    heads = SAEMetadata(hook_name="blocks.3.attn.hook_z")
    randomised(kind(config(d_in=D, d_sae=F, k=K, reshape_activations="hook_z", metadata=heads))).save_inference_model(
        out / "topk_of_heads"
    )
    keep_loaded(out / "topk_of_heads", torch.randn(ROWS, 2, D // 2))


# The others


def dictionary_learning(out: Path) -> None:
    """As dictionary_learning.training.trainSAE saves what its trainers have."""
    common = {"steps": 10, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "EleutherAI/pythia-70m"}
    common |= {"device": "cpu", "submodule_name": "resid_post_layer_3"}
    trainers: dict[str, Callable[[], Any]] = {
        "standard": lambda: StandardTrainer(**common, warmup_steps=1, sparsity_warmup_steps=2),
        "april_update": lambda: StandardTrainerAprilUpdate(**common, warmup_steps=1, sparsity_warmup_steps=2),
        "gated": lambda: GatedSAETrainer(**common, warmup_steps=1, sparsity_warmup_steps=2),
        "jumprelu": lambda: JumpReluTrainer(**common, warmup_steps=1, sparsity_warmup_steps=2),
        "topk": lambda: TopKTrainer(**common, k=K, warmup_steps=1),
        "batchtopk": lambda: BatchTopKTrainer(**common, k=K, warmup_steps=1),
        "matryoshka": lambda: MatryoshkaBatchTopKTrainer(**common, k=K, warmup_steps=1, group_fractions=[0.25, 0.75]),
    }
    made = [(name, (trainer := build()).ae, trainer.config) for name, build in trainers.items()]
    described = {"dict_class": "AutoEncoderNew", "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "m"}
    made.append(("standard_new", AutoEncoderNew(D, F), described))
    for name, ae, config in made:
        randomised(ae)
        if hasattr(ae, "k"):
            ae.threshold.fill_(0.8)
        folder = out / name
        folder.mkdir()
        torch.save(ae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"ctx_len": 128}}))
        x = torch.randn(ROWS, D)
        keep(folder, x, ae.encode(x), ae(x))


def sparsify(out: Path) -> None:
    for transcode, skip in itertools.product((False, True), (False, True)):
        config = SparseCoderConfig(num_latents=F, k=K, transcode=transcode, skip_connection=skip)
        coder = randomised(SparseCoder(D, config))
        folder = out / f"layers.3.transcode_{transcode}_skip_{skip}"
        coder.save_to_disk(folder)
        x = torch.randn(ROWS, D)
        values, features, _ = coder.encode(x)
        codes = torch.zeros(ROWS, F).scatter(1, features, values)
        keep(folder, x, codes, coder(x).sae_out)


def openmoss(out: Path) -> None:
    activations, scalings = ("relu", "jumprelu", "topk"), ("dataset-wise", "inference", "token-wise")
    for act_fn, scaling, by_norm, target in itertools.product(activations, scalings, (True, False), (IN, OUT)):
        if scaling == "token-wise" and target == OUT:
            continue  # y_hat is scaled back by the norm of y, which nobody knows outside training
        settings = {"act_fn": act_fn, "norm_activation": scaling, "sparsity_include_decoder_norm": by_norm, "top_k": K}
        config = SAEConfig(hook_point_in=IN, hook_point_out=target, d_model=D, expansion_factor=F / D, **settings)
        sae = randomised(SparseAutoEncoder.from_config(config))
        sae.set_dataset_average_activation_norm({IN: 5.0, target: 5.0 if target == IN else 0.7})
        folder = out / f"{act_fn}_{scaling}_{by_norm}_{'sae' if target == IN else 'transcoder'}"
        sae.save_pretrained(folder)
        config.save_hyperparameters(folder)
        x = torch.randn(ROWS, D)
        scaled, factors = sae.normalize_activations({target: x, IN: x}, return_scale_factor=True)
        codes = sae.encode(scaled[IN])
        keep(folder, x, codes, sae.decode(codes) / factors[target])


def main(out: Path) -> None:
    torch.manual_seed(0)
    makers = {"sae_lens": (sae_lens_trained, sae_lens_others), "dictionary_learning": (dictionary_learning,)}
    for library, making in (makers | {"sparsify": (sparsify,), "openmoss": (openmoss,)}).items():
        (out / library).mkdir(parents=True)
        for make in making:
            make(out / library)


main(Path(sys.argv[1]))
