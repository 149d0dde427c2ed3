"""Load a model folder, and prove that what was loaded is transformers' model with working taps."""

from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from universality.errors import StudyError
from universality.models.language_model import FAMILIES, LanguageModel
from universality.models.precision import has_bf16_products, use_bf16_products
from universality.models.taps import Shape
from universality.runtime import log

Products = Literal["float32", "bfloat16"]

_PROBE = (2, 8)  # sequences and tokens that a model is checked on
_CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def load_model(folder: Path | str, products: Products = "float32", device: str = "cpu") -> LanguageModel:
    """A model from a folder in transformers' format with safetensors weights, ready to evaluate.

    Weights are float32; with `products` bfloat16 the matrix products are rounded to it where the CPU has instructions
    for that, and the log says what it costs. Raises StudyError naming the folder if it cannot be read, lacks a tensor,
    holds values that are not finite, or if its family's forward is not transformers' own to rounding; then with the
    site. No code from the folder is run.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise StudyError(f"{folder}: device cuda is asked for, but torch finds none on this machine; allowed: cpu")
    try:
        hf, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # the library raises many kinds, each with pages of text
        raise StudyError(f"{folder}: not a readable model folder: {' '.join(str(error).split())[:200]}") from None
    if loading["missing_keys"]:
        raise StudyError(f"{folder}: the checkpoint lacks {sorted(loading['missing_keys'])[0]!r}")
    model = open_model(hf.eval().requires_grad_(False), str(folder))
    if products == "bfloat16":
        _round_products(model, str(folder))
    model.hf.to(device)
    return model


@torch.no_grad()
def open_model(hf: nn.Module, where: str) -> LanguageModel:
    """A LanguageModel of `hf`, float32 on the CPU, after checking it against what transformers computes with it.

    Raises StudyError naming `where`, the family and the site.
    """
    name = hf.config.model_type
    if name not in FAMILIES:
        raise StudyError(f"{where}: model family {name!r} is unknown; allowed: {', '.join(FAMILIES)}")
    for key, value in hf.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise StudyError(f"{where}: {key} holds values that are not finite")
    FAMILIES[name].prepare(hf)
    tokens = _probe_tokens(hf.config.vocab_size)
    hf.config._attn_implementation, ours = "sdpa", hf.config._attn_implementation
    expected = hf(tokens, use_cache=False).logits
    hf.config._attn_implementation = ours
    if not bool(torch.isfinite(expected).all()):
        raise StudyError(f"{where}: {name}: its logits are not finite")
    model = LanguageModel(hf)
    _check_sites(model, tokens, expected, f"{where}: {name}")
    return model


def _probe_tokens(vocab_size: int) -> torch.Tensor:
    return (torch.arange(_PROBE[0] * _PROBE[1]).reshape(_PROBE) * 7 + 3) % vocab_size


def _check_sites(model: LanguageModel, tokens: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    """Shapes as declared; logits as transformers'; and, with every site patched clean onto clean, each one receives
    what it is patched with: no patch before it changed anything."""
    sites = {site.replace("@P", "@-1"): shape for site, shape in model.sites.items()}
    run = model.run(tokens, capture=sites)
    for site, shape in sites.items():
        _check_shape(run.captured, site, shape, where)
    if not torch.allclose(run.logits, expected, **_CLOSE):
        worst = float((run.logits - expected).abs().max())
        raise StudyError(f"{where}: logits differ from transformers' by up to {worst:.2g}")

    def patch(site: str):
        def edit(value: torch.Tensor) -> torch.Tensor:
            clean = run.captured[site]
            if not torch.allclose(value, clean, **_CLOSE):
                raise StudyError(f"{where}: patching clean onto clean changes site {site}")
            return clean

        return edit

    patched = model.run(tokens, edits={site: patch(site) for site in sites}).logits
    if not torch.allclose(patched, run.logits, **_CLOSE):
        raise StudyError(f"{where}: patching clean onto clean changes the logits after site final_norm")


def _check_shape(captured: dict[str, torch.Tensor], site: str, shape: Shape, where: str) -> None:
    sizes: dict[int | str, int] = {"B": _PROBE[0], "L": _PROBE[1], "P": _PROBE[1]}
    if site not in captured:
        raise StudyError(f"{where}: site {site} was not reached")
    declared, found = tuple(sizes.get(size, size) for size in shape), tuple(captured[site].shape)
    if found != declared:
        raise StudyError(f"{where}: site {site} has shape {found}, not {declared}")


def _round_products(model: LanguageModel, where: str) -> None:
    if not has_bf16_products():
        log.info("%s: this CPU has no bfloat16 products; float32 is used", where)
        return
    tokens = _probe_tokens(model.hf.config.vocab_size)
    exact = model.run(tokens).logits
    use_bf16_products(model.hf, model.family.float32_products)
    error = model.run(tokens).logits - exact
    model.product_error = float(error.norm() / exact.norm())
    log.info("%s: bfloat16 products change the logits by %.2g of their norm", where, model.product_error)
