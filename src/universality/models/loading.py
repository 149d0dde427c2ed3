"""Load a model folder, and prove that what was loaded is transformers' model with working taps."""

from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from universality.errors import StudyError
from universality.kernels.hardware import has_bf16_products
from universality.models.language_model import FAMILIES, LanguageModel
from universality.models.precision import Products, use_bf16_products
from universality.models.taps import Shape
from universality.runtime import log

_PROBE = (2, 8)  # sequences and tokens that a model's sites are checked on
_LONG_PROBE = 70  # tokens, more than a chunk of any scan, that its logits are checked on without looking at any site
_CLOSE = {"rtol": 1e-3, "atol": 1e-4}
_AS_FAR = 4  # from the logits in float64 ours may be so many times as far as transformers' are


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
    model = open_model(hf.eval().requires_grad_(False).to(device), str(folder))
    if products == "bfloat16":
        _round_products(model, str(folder), device)
    return model


@torch.no_grad()
def open_model(hf: nn.Module, where: str) -> LanguageModel:
    """A LanguageModel of `hf`, in float32, after checking it against what transformers computes with it.

    Raises StudyError naming `where`, the family and the site.
    """
    name = hf.config.model_type
    if name not in FAMILIES:
        raise StudyError(f"{where}: model family {name!r} is unknown; allowed: {', '.join(FAMILIES)}")
    for key, value in hf.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise StudyError(f"{where}: {key} holds values that are not finite")
    FAMILIES[name].prepare(hf)
    limit = FAMILIES[name].max_positions(hf.config) or _LONG_PROBE
    probes = [_probe_tokens(hf, *shape) for shape in (_PROBE, (1, min(_LONG_PROBE, limit)))]
    hf.config._attn_implementation, ours = "sdpa", hf.config._attn_implementation
    expected = [_Expected(tokens, hf(tokens, use_cache=False).logits) for tokens in probes]
    hf.config._attn_implementation = ours
    model = LanguageModel(hf)
    where = f"{where}: {name}"
    for probe in expected:
        if not bool(torch.isfinite(probe.logits).all()):
            raise StudyError(f"{where}: its logits are not finite")
        _check_logits(model.run(probe.tokens).logits, probe, hf, where)
    _check_sites(model, expected[0], where)
    return model


class _Expected(NamedTuple):
    """What transformers makes of tokens."""

    tokens: torch.Tensor
    logits: torch.Tensor


def _check_logits(ours: torch.Tensor, expected: _Expected, hf: nn.Module, where: str) -> None:
    """A model that amplifies rounding is no other model: what counts then is how far either is from float64."""
    theirs = expected.logits
    if torch.allclose(ours, theirs, **_CLOSE):
        return
    exact = _in_double(hf, expected.tokens)
    error, rounding = (float((logits - exact).abs().max()) for logits in (ours, theirs))
    if not error <= _AS_FAR * rounding:
        worst = float((ours - theirs).abs().max())
        raise StudyError(
            f"{where}: logits differ from transformers' by up to {worst:.2g}, which rounding moves by {rounding:.2g}"
        )
    log.info("%s: rounding moves its logits by %.2g in transformers, by %.2g here", where, rounding, error)


def _in_double(hf: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits in float64 by transformers' own code, which a model that was taken over does not run any more."""
    fresh = type(hf)(deepcopy(hf.config))
    fresh.load_state_dict(hf.state_dict())
    FAMILIES[hf.config.model_type].prepare(fresh)
    fresh.config._attn_implementation = "sdpa"
    return fresh.to(tokens.device, torch.float64).eval()(tokens, use_cache=False).logits


def _probe_tokens(hf: nn.Module, n_sequences: int, length: int) -> torch.Tensor:
    tokens = (torch.arange(n_sequences * length).reshape(n_sequences, length) * 7 + 3) % hf.config.vocab_size
    return tokens.to(next(hf.parameters()).device)


def _check_sites(model: LanguageModel, expected: _Expected, where: str) -> None:
    """Shapes as declared; logits as transformers' with every site looked at, too; and, with every site patched clean
    onto clean, each one receives what it is patched with: no patch before it changed anything."""
    sites = {site.replace("@P", "@-1"): shape for site, shape in model.sites.items()}
    run = model.run(expected.tokens, capture=sites)
    for site, shape in sites.items():
        _check_shape(run.captured, site, shape, where)
    _check_logits(run.logits, expected, model.hf, where)

    def patch(site: str):
        def edit(value: torch.Tensor) -> torch.Tensor:
            clean = run.captured[site]
            if not torch.allclose(value, clean, **_CLOSE):
                raise StudyError(f"{where}: patching clean onto clean changes site {site}")
            return clean

        return edit

    patched = model.run(expected.tokens, edits={site: patch(site) for site in sites}).logits
    if not torch.allclose(patched, run.logits, **_CLOSE):
        raise StudyError(f"{where}: patching clean onto clean changes the logits after site final_norm")


def _check_shape(captured: dict[str, torch.Tensor], site: str, shape: Shape, where: str) -> None:
    sizes: dict[int | str, int] = {"B": _PROBE[0], "L": _PROBE[1], "P": _PROBE[1]}
    if site not in captured:
        raise StudyError(f"{where}: site {site} was not reached")
    declared, found = tuple(sizes.get(size, size) for size in shape), tuple(captured[site].shape)
    if found != declared:
        raise StudyError(f"{where}: site {site} has shape {found}, not {declared}")


def _round_products(model: LanguageModel, where: str, device: str) -> None:
    if not has_bf16_products(device):
        log.info("%s: this machine has no bfloat16 products; float32 is used", where)
        return
    tokens = _probe_tokens(model.hf, *_PROBE)
    exact = model.run(tokens).logits
    use_bf16_products(model.hf, model.family.float32_products)
    error = model.run(tokens).logits - exact
    model.products = "bfloat16"
    model.product_error = float(error.norm() / exact.norm().clamp_min(1e-30))
    log.info("%s: bfloat16 products change the logits by %.2g of their norm", where, model.product_error)
