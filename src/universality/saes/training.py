"""Train one SAE on the cached activations of one site."""

from pathlib import Path

import numpy as np
import torch

from universality.activations.store import read_site
from universality.errors import StudyError
from universality.runtime import log, progress
from universality.saes.base import SAE, save_sae
from universality.saes.settings import SAETraining, Variant
from universality.saes.variants import build_sae

_DECODER_NORM = {"topk": 1.0, "standard": 0.1}  # at the start, as in the papers the variants cite
_LOG_STEPS = 50


def train_sae(
    shards: list[Path], site: str, variant: Variant, training: SAETraining, seed: int, model: str, out: Path
) -> None:
    """Train on all rows of `site`, drawn without replacement epoch by epoch, and write a sae-lens folder with curves.

    Raises StudyError if there are fewer rows than a batch or a loss is not finite.
    """
    x = read_site(shards, site)
    if len(x) < training.batch_size:
        raise StudyError(f"saes.training.batch_size: {training.batch_size} is more than the {len(x)} rows of {site}")
    scale = float(np.sqrt(x.shape[1])) / float(x.norm(dim=1).mean())
    x *= scale
    sae = build_sae(x.shape[1], training.d_sae, variant)
    sae.initialise(x.mean(0), _DECODER_NORM[sae.architecture], torch.Generator().manual_seed(seed))
    curves = _optimise(sae, x, training, seed)
    sae.fold_input_scale(scale)
    context = {"model_name": model, "hook_name": site, "seed": seed}
    save_sae(sae, out, context, curves)
    log.info("%s %s: loss %.4f, L0 %.1f", model, site, curves["loss"][-1], curves["L0"][-1])


def _optimise(sae: SAE, x: torch.Tensor, training: SAETraining, seed: int) -> dict[str, list]:
    optimiser = torch.optim.Adam(sae.parameters(), lr=training.learning_rate, betas=(0.9, 0.999), fused=True)
    batches = _batches(len(x), training.batch_size, np.random.default_rng(seed))
    variance = float(x.var(dim=0, unbiased=False).sum())
    curves: dict[str, list] = {"step": [], "loss": [], "L0": [], "explained_variance": []}
    for step in progress(range(training.steps), "sae steps"):
        batch = x[next(batches)]
        warmth = min(1.0, (step + 1) / max(1, training.warmup_steps))
        cooling = min(1.0, (training.steps - step) / max(1.0, training.decay_fraction * training.steps))
        optimiser.param_groups[0]["lr"] = training.learning_rate * warmth * cooling
        loss, codes = sae.loss(batch, warmth)
        if not torch.isfinite(loss):
            raise StudyError(
                f"SAE training: the loss at step {step} is {loss.item()}; lower saes.training.learning_rate"
            )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        sae.after_step()
        if step % _LOG_STEPS == 0 or step == training.steps - 1:
            with torch.no_grad():
                error = float((batch - sae.decode(codes)).square().sum(-1).mean())
            curves["step"].append(step + 1)
            curves["loss"].append(loss.item())
            curves["L0"].append(float((codes > 0).sum(-1).float().mean()))
            curves["explained_variance"].append(1 - error / variance)
    return curves


def _batches(n_rows: int, size: int, rng: np.random.Generator):
    """Endless batches of row indices; each epoch is one permutation, its short rest dropped."""
    while True:
        order = torch.from_numpy(rng.permutation(n_rows))
        yield from (order[start : start + size] for start in range(0, n_rows - size + 1, size))
