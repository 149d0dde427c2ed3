"""Train one SAE on activations of one site, from the store or from a running model."""

from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from universality.activations.batches import ActivationBatches
from universality.errors import StudyError
from universality.runtime import log, progress
from universality.saes.base import SAE, save_sae
from universality.saes.settings import SAETraining, Variant
from universality.saes.variants import build_sae

_DECODER_NORM = {"topk": 1.0, "standard": 0.1}  # at the start, as in the papers the variants cite
_LOG_STEPS = 50


def train_sae(batches: ActivationBatches, variant: Variant, training: SAETraining, seed: int, out: Path) -> None:
    """Train on shuffled batches and write a sae-lens folder with curves.

    Raises StudyError if there are fewer rows than a batch or a loss is not finite.
    """
    if batches.n_rows < training.batch_size:
        raise StudyError(
            f"saes.training.batch_size: {training.batch_size} is more than the {batches.n_rows} rows of {batches.site}"
        )
    data = batches.statistics()
    if data.variance == 0:
        raise StudyError(f"{batches.model} {batches.site}: is the same at every token; there is nothing to learn")
    scale = float(np.sqrt(batches.d_in)) / data.mean_norm
    sae = build_sae(batches.d_in, training.d_sae, variant)
    sae.initialise((data.mean * scale).float(), _DECODER_NORM[sae.architecture], torch.Generator().manual_seed(seed))
    curves = _optimise(sae, batches, scale, data.variance * scale**2, training, seed)
    sae.fold_input_scale(scale)
    context = {"model_name": batches.model, "hook_name": batches.site, "seed": seed}
    save_sae(sae, out, context, curves)
    log.info("%s %s: loss %.4f, L0 %.1f", batches.model, batches.site, curves["loss"][-1], curves["L0"][-1])


def _optimise(
    sae: SAE, batches: ActivationBatches, scale: float, variance: float, training: SAETraining, seed: int
) -> dict[str, list]:
    """Curves; `variance` is that of the scaled inputs."""
    optimiser = torch.optim.Adam(sae.parameters(), lr=training.learning_rate, betas=(0.9, 0.999), fused=True)
    curves: dict[str, list] = {"step": [], "loss": [], "L0": [], "explained_variance": []}
    with closing(batches.batches(training.batch_size, seed)) as inputs:
        for step in progress(range(training.steps), "sae steps"):
            batch = next(inputs) * scale
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
