"""Train dictionaries on activations, from the store or from a running model: several at once from one pass over them.

The state is checkpointed every `checkpoint_steps`. Everything random at a step is drawn from (seed, step), so a resumed
training sees what it would have seen and ends with the same bytes.
"""

from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import torch

from universality.activations.batches import ActivationBatches
from universality.activations.statistics import Statistics
from universality.checkpoint import read_checkpoint, write_checkpoint
from universality.errors import StudyError
from universality.kernels.hardware import has_bf16_products
from universality.provenance import running_code
from universality.runtime import log, progress
from universality.saes.base import SAE, Step
from universality.saes.build import initial_sae
from universality.saes.crosscoder import Crosscoder
from universality.saes.curves import Curves, TensorBoard
from universality.saes.folder import save_sae
from universality.saes.resampling import ResampledSAE
from universality.saes.settings import AnyVariant, SAETraining, TranscoderSettings
from universality.saes.sparse.adam import Adam
from universality.saes.transcoder import Transcoder
from universality.settings import OnMismatch


class Wanted(NamedTuple):
    """A dictionary to train: what of, the seed of its initial weights, the folder it goes to."""

    variant: AnyVariant
    seed: int
    out: Path


class Scaled(NamedTuple):
    """How activations are brought to mean norm sqrt(width): the factor of each site, and the same for every dimension
    [d_in]; the mean [d_in] then, and each site's variance, summed over its dimensions."""

    site_factors: list[float]
    factors: torch.Tensor
    mean: torch.Tensor
    variances: list[float]
    widths: list[int]


def train_saes(
    batches: ActivationBatches,
    wanted: list[Wanted],
    training: SAETraining,
    checkpoint: Path,
    on_mismatch: OnMismatch = OnMismatch.refuse,
    tensorboard: Path | None = None,
) -> None:
    """Train on shuffled batches; write a folder each, with curves.

    Raises StudyError if there are fewer rows than a batch, if activations are constant or not finite, if a loss stops
    being finite, and for a checkpoint of another training.
    """
    if batches.n_rows < training.batch_size:
        raise StudyError(
            f"saes.training.batch_size: {training.batch_size} is more than the {batches.n_rows} rows of {batches.site}"
        )
    if training.products == "bfloat16" and not has_bf16_products("cpu"):
        log.info("this machine has no bfloat16 products; float32 is used")
        training = training.model_copy(update={"products": "float32"})
    scaled = _scaled(batches)
    trainees = [Trainee(one, training, scaled) for one in wanted]
    run = _Run(batches, trainees, training, checkpoint, _made_from(batches, wanted, training))
    run.restore(on_mismatch)
    with closing(TensorBoard(tensorboard, [one.out.relative_to(one.out.anchor).as_posix() for one in wanted])) as board:
        run.go_on(scaled, board)
    sites = [{"model_name": part.model, "hook_name": part.site} for part in batches.parts]
    for trainee in trainees:
        trainee.save(sites)
    checkpoint.unlink(missing_ok=True)


def _scaled(batches: ActivationBatches) -> Scaled:
    factors, means, variances = [], [], []
    for part in batches.parts:
        data = part.statistics()
        _check(data, f"{part.model} {part.site}")
        factor = float(np.sqrt(part.d_in)) / data.mean_norm
        factors.append(factor)
        means.append((data.mean * factor).float())
        variances.append(data.variance * factor**2)
    widths = [part.d_in for part in batches.parts]
    of_dimensions = torch.tensor(factors).repeat_interleave(torch.tensor(widths))
    return Scaled(factors, of_dimensions, torch.cat(means), variances, widths)


def _check(data: Statistics, where: str) -> None:
    if not np.isfinite(data.mean_norm):
        raise StudyError(f"{where}: has activations that are not finite")
    if data.variance == 0:
        raise StudyError(f"{where}: is the same at every token; there is nothing to learn")


class Trainee:
    """One dictionary with its optimiser and its curves."""

    def __init__(self, wanted: Wanted, training: SAETraining, scaled: Scaled):
        self.wanted, self.training, self.scaled = wanted, training, scaled
        # A transcoder's input comes first, then what it is to predict; all others reconstruct what they read.
        first = scaled.widths[0] if isinstance(wanted.variant, TranscoderSettings) else 0
        self.read = slice(0, first or None)
        self.written = slice(first, None)
        self.variance = sum(scaled.variances[1:] if first else scaled.variances)
        mean = scaled.mean[self.written]
        d_sae = wanted.variant.d_sae or training.d_sae
        self.sae: SAE = initial_sae(wanted.variant, d_sae, scaled.widths, mean, wanted.seed)
        self.sae.products, self.sae.dead_steps = training.products, training.dead_steps
        self.adam = Adam(self.sae, ("W_dec",) if self.sae.unit_norm_decoder else ())
        self.curves = Curves()

    def step(self, rows: torch.Tensor, number: int) -> None:
        """Train on rows [B, sum of widths], scaled."""
        training = self.training
        x, target = rows[:, self.read], rows[:, self.written]
        sparsity_warmth = min(1.0, (number + 1) / max(1, training.sparsity_warmup_steps))
        step = self.sae.train_step(x, target, sparsity_warmth)
        if not torch.isfinite(step.loss):
            raise StudyError(
                f"SAE training: the loss at step {number} is {step.loss.item()}; lower saes.training.learning_rate"
            )
        step.loss.backward()
        rate = _learning_rate(number, training, self.wanted.variant.learning_rate)
        norm = self.adam.step(rate, training.gradient_norm)
        if not np.isfinite(norm):
            raise StudyError(
                f"SAE training: the gradient at step {number} is {norm}; lower saes.training.learning_rate"
            )
        if number == training.steps - max(1, training.steps // 10):
            self.sae.forget_firings()  # how often features fire is told of the last tenth
        self.sae.after_step(step)
        self._resample(target, step, number)
        if number % training.log_steps == 0 or number == training.steps - 1:
            self._log(number, step, target, rate, norm)

    def _resample(self, target: torch.Tensor, step: Step, number: int) -> None:
        every = getattr(self.wanted.variant, "resample_steps", None)
        falling = number + 1 >= (1 - self.training.decay_fraction) * self.training.steps
        if every is None or (number + 1) % every or falling or not isinstance(self.sae, ResampledSAE):
            return
        drawn = np.random.SeedSequence([self.wanted.seed, number]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(drawn[0]))
        anew = self.sae.resample(target, step, generator)
        for name in ("W_enc", "W_dec", *self.sae.at_the_start()):
            self.adam.forget(name, anew)

    @torch.no_grad()
    def _log(self, number: int, step: Step, target: torch.Tensor, rate: float, norm: float) -> None:
        error = float((target - step.x_hat).square().sum(-1).mean())
        self.curves.add(
            step=number + 1,
            loss=step.loss.item(),
            L0=int((step.values > 0).sum()) / len(target),
            explained_variance=1 - error / self.variance,
            dead=len(self.sae.dead()) / self.sae.d_sae,
            learning_rate=rate,
            gradient_norm=norm,
        )

    def state(self) -> dict:
        return {"sae": self.sae.state_dict(), "adam": self.adam.state(), "curves": self.curves.columns}

    def restore(self, state: dict) -> None:
        self.sae.load_state_dict(state["sae"])
        self.adam.restore(state["adam"])
        self.curves = Curves(state["curves"])

    def save(self, sites: list[dict]) -> None:
        """Write the folder; `sites` are model_name and hook_name of each site. Raises StudyError if a weight is not
        finite."""
        sae, factors = self.sae.eval(), self.scaled.factors
        for name, parameter in sae.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise StudyError(f"SAE training: {name} is not finite; lower saes.training.learning_rate")
        sae.rescale(factors[self.read], factors[self.written])
        save_sae(sae, self.wanted.out, self._metadata(sites), self.curves.columns, sae.frequencies())
        log.info("%s: %s", self.wanted.out, self.curves.last())

    def _metadata(self, sites: list[dict]) -> dict:
        """What the folder tells of its making, under sae-lens' names where it has them."""
        metadata: dict = {**sites[0], "seed": self.wanted.seed, "prepend_bos": True}
        metadata["exclude_special_tokens"] = True  # end of text leads every sequence, and is read but not encoded
        metadata |= {"training_architecture": self.sae.architecture, "training": _course(self.training)}
        metadata["variant"] = self.wanted.variant.model_dump(mode="json")
        if isinstance(self.sae, Transcoder):
            metadata["hook_name_out"] = sites[1]["hook_name"]
        if isinstance(self.sae, Crosscoder):
            metadata["sites"] = sites
        return metadata


class _Run:
    """The training of some dictionaries, from the step it stands at."""

    def __init__(
        self,
        batches: ActivationBatches,
        trainees: list[Trainee],
        training: SAETraining,
        checkpoint: Path,
        made_from: dict[str, str],
    ):
        self.batches, self.trainees, self.training = batches, trainees, training
        self.checkpoint, self.made_from, self.done = checkpoint, made_from, 0

    def go_on(self, scaled: Scaled, board: TensorBoard) -> None:
        training, steps = self.training, self.training.steps
        what = f"{self.batches.model} {self.batches.site} sae steps"
        with closing(self.batches.batches(training.batch_size, training.data_seed, self.done)) as rows:
            numbers = range(self.done, steps)
            for number in progress(numbers, what, steps, self.done, status=self.trainees[-1].curves.last):
                batch = next(rows).mul_(scaled.factors)
                for trainee in self.trainees:
                    trainee.step(batch, number)
                board.add([trainee.curves for trainee in self.trainees])
                self.done = number + 1
                if self.done % training.checkpoint_steps == 0 and self.done < steps:
                    self._save()

    def _save(self) -> None:
        state = {"done": self.done, "trainees": [trainee.state() for trainee in self.trainees]}
        write_checkpoint(self.checkpoint, self.made_from, state)

    def restore(self, on_mismatch: OnMismatch) -> None:
        state = read_checkpoint(self.checkpoint, self.made_from, on_mismatch)
        if state is None:
            return
        self.done = state["done"]
        for trainee, its_state in zip(self.trainees, state["trainees"], strict=True):
            trainee.restore(its_state)
        log.info("going on from step %d of %s", self.done, self.checkpoint)


def _learning_rate(step: int, training: SAETraining, own: float | None) -> float:
    """Linear rise, plateau, linear fall to nothing."""
    rise = (step + 1) / max(1, training.warmup_steps)
    fall = (training.steps - step) / max(1.0, training.decay_fraction * training.steps)
    return (own or training.learning_rate) * min(1.0, rise, fall)


def _course(training: SAETraining) -> dict:
    """The settings that what comes out depends on."""
    return training.model_dump(mode="json", exclude={"checkpoint_steps"})


def _made_from(batches: ActivationBatches, wanted: list[Wanted], training: SAETraining) -> dict[str, str]:
    """Everything that decides on a training's course."""
    made_from = {f"saes.training.{key}": str(value) for key, value in _course(training).items()}
    return made_from | {
        "variants or seeds": " ".join(f"{one.variant.canonical()} {one.seed}" for one in wanted),
        "activations": batches.identity(),
        "code": running_code("universality.saes.commands"),
        "libraries": " ".join(f"{library.__name__} {library.__version__}" for library in (torch, numba, np)),
        "threads": str(torch.get_num_threads()),
    }
