"""Train a small model from a named seed until induction shows; write it as a transformers folder with its curves.

The state is checkpointed every `checkpoint_steps`, so a killed training goes on from the last checkpoint to the same
bytes. A checkpoint made under other settings, tokens, code, libraries or threads is not used.
"""

from pathlib import Path

import numba
import torch
import torch.nn.functional as F
import transformers

from universality.checkpoint import read_checkpoint, write_checkpoint
from universality.corpus.tokenizer import load_tokenizer
from universality.corpus.tokens import TokenSequences, read_tokens
from universality.errors import StudyError
from universality.models.batches import IGNORED, Batches
from universality.models.induction import induction_score, repeated_sequences
from universality.models.initialisation import initialised
from universality.models.language_model import FAMILIES, LanguageModel
from universality.models.settings import TrainedModel, TrainingSettings
from universality.provenance import running_code
from universality.runtime import log, progress
from universality.settings import OnMismatch
from universality.storage import replacing, sha256, write_json, write_table

Curves = dict[str, list[float]]


def new_model(model: TrainedModel, sequences: TokenSequences) -> LanguageModel:
    """A randomly initialised model of the study's vocabulary and sequence length."""
    config = FAMILIES[model.family].configure(
        model, sequences.vocab_size, sequences.tokens.shape[1], sequences.end_of_text
    )
    return LanguageModel(initialised(config, model.seed))


def train_model(
    name: str,
    model: TrainedModel,
    training: TrainingSettings,
    tokens_folder: Path,
    tokenizer_folder: Path,
    checkpoint: Path,
    out: Path,
) -> None:
    """Raises StudyError if the loss stops being finite or induction stays below `min_induction_gain`."""
    sequences = read_tokens(tokens_folder, "train")
    held_out = read_tokens(tokens_folder, "evaluation").tokens[: training.evaluation_sequences]
    trainer = _Trainer(name, model, training, sequences, torch.from_numpy(held_out).long())
    trainer.made_from = _made_from(model, training, tokens_folder)
    trainer.restore(checkpoint)
    trainer.run(checkpoint)
    curves = trainer.curves
    if not curves["induction_gain"][-1] >= training.min_induction_gain:
        raise StudyError(
            f"models.zoo.{name}: after {model.steps} steps repetition raises the right token's log-probability by "
            f"{curves['induction_gain'][-1]:.2f} nats, less than min_induction_gain={training.min_induction_gain}; "
            "train for more steps"
        )
    with replacing(out) as folder:
        trainer.model.hf.save_pretrained(folder, safe_serialization=True)
        load_tokenizer(tokenizer_folder).save_pretrained(folder)
        write_table(folder / "training.parquet", curves)
        write_json(folder / "induction.json", {key: values[-1] for key, values in curves.items()})
    checkpoint.unlink(missing_ok=True)


class _Trainer:
    """The whole state of a training."""

    def __init__(self, name: str, settings: TrainedModel, training: TrainingSettings, sequences, held_out):
        self.name, self.settings, self.training = name, settings, training
        self.model = new_model(settings, sequences)
        self.batches = Batches(sequences, training, settings.batch_size, settings.seed)
        self.held_out = held_out
        self.repeated = repeated_sequences(
            training.evaluation_sequences,
            sequences.tokens.shape[1],
            sequences.vocab_size,
            sequences.end_of_text,
            settings.seed,
        )
        self.optimiser = _optimiser(self.model, settings.learning_rate, training.weight_decay)
        self.step = 0
        self.curves: Curves = {}
        self.made_from: dict[str, str] = {}

    def run(self, checkpoint: Path) -> None:
        steps = self.settings.steps
        self.model.hf.train()
        for step in progress(range(self.step, steps), f"{self.name} training steps", total=steps, done=self.step):
            loss = self._one_step(step)
            self.step = step + 1
            if self.step % self.training.checkpoint_steps == 0 or self.step == steps:
                self._evaluate(loss)
                self._save(checkpoint)

    def _one_step(self, step: int) -> float:
        tokens, labels = self.batches.at(step)
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * _schedule(step, self.settings.steps, self.training)
        logits = self.model.run(tokens).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        if not torch.isfinite(loss):
            raise StudyError(f"models.zoo.{self.name}: the loss at step {step} is {loss.item()}; lower learning_rate")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.hf.parameters(), 1.0)
        self.optimiser.step()
        return loss.item()

    def _evaluate(self, train_loss: float) -> None:
        self.model.hf.eval()
        with torch.inference_mode():
            logits = self.model.run(self.held_out).logits[:, :-1]
            text_loss = F.cross_entropy(logits.flatten(0, 1), self.held_out[:, 1:].flatten())
        score = induction_score(self.model, self.repeated)
        self.model.hf.train()
        point = {"step": self.step, "train_loss": train_loss, "text_loss": float(text_loss)}
        point |= {f"induction_{key}": value for key, value in score._asdict().items()}
        for key, value in point.items():
            self.curves.setdefault(key, []).append(value)
        log.info(
            "%s step %d: text %.3f nats/token, induction gain %.2f nats, top-1 %.3f",
            self.name, self.step, text_loss, score.gain, score.top1,
        )  # fmt: skip

    def _save(self, checkpoint: Path) -> None:
        state = {
            "step": self.step,
            "curves": self.curves,
            "model": self.model.hf.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        write_checkpoint(checkpoint, self.made_from, state)

    def restore(self, checkpoint: Path) -> None:
        state = read_checkpoint(checkpoint, self.made_from, OnMismatch.restart)
        if state is None:
            return
        self.model.hf.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.curves = state["step"], state["curves"]
        log.info("%s: going on from step %d of %s", self.name, self.step, checkpoint)


def _optimiser(model: LanguageModel, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; decay on matrices only, and not on Mamba's A_log."""
    named = list(model.hf.named_parameters())
    decayed = [p for name, p in named if p.ndim >= 2 and not name.endswith("A_log")]
    others = [p for name, p in named if p.ndim < 2 or name.endswith("A_log")]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def _schedule(step: int, steps: int, training: TrainingSettings) -> float:
    """Linear rise, plateau, linear fall, as shares of the learning rate."""
    rise = (step + 1) / max(1.0, training.warmup_fraction * steps)
    fall = (steps - step) / max(1.0, training.decay_fraction * steps)
    return min(1.0, rise, fall)


def _made_from(model: TrainedModel, training: TrainingSettings, tokens_folder: Path) -> dict[str, str]:
    """Everything that decides on a training's course: settings, tokens, our code, libraries, threads."""
    libraries = [f"{library.__name__} {library.__version__}" for library in (torch, numba, transformers)]
    return {
        "settings": f"{model.canonical()} {training.canonical()}",
        "tokens": " ".join(sha256(path) for path in sorted(tokens_folder.glob("*.*"))),
        "code": running_code("universality.models.commands"),
        "libraries": " ".join(libraries),
        "threads": str(torch.get_num_threads()),
    }
