"""`universality models`: train a small model, bring one in, or draw the weights of an untrained one."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import model_validator

from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.errors import StudyError
from universality.models.settings import AnyModel, TrainedModel, TrainingSettings, UntrainedModel
from universality.runtime import configure, deterministic_torch
from universality.settings import Settings as SettingsBase
from universality.settings import parse_argument

app = stage("Train small language models, bring models in from a folder or the hub, or make untrained ones.")


class ModelJob(SettingsBase):
    """One model of models.zoo, with models.training if it is trained here."""

    model: AnyModel
    training: TrainingSettings | None = None

    @model_validator(mode="after")
    def _training_where_needed(self):
        if isinstance(self.model, TrainedModel) and self.training is None:
            raise ValueError("a model with source: train needs training settings")
        return self


@app.command(
    epilog=example(
        """models make --name pythia --settings '{"model": {"source": "hub", "family": "gpt_neox",
        "name": "EleutherAI/pythia-160m", "n_layers": 12,
        "d_model": 768}}' --tokens tokens --tokenizer tokenizer --out models/pythia"""
    )
)
def make(
    name: Annotated[str, typer.Option(help="The model's name in the study.")],
    settings: Settings,
    tokens: Annotated[Path, typer.Option(help="Tokens folder from `corpus tokens`.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder from `corpus tokenizer`.")],
    out: Out,
    like: Annotated[
        Path | None, typer.Option(help="With source untrained: folder of the model that it is like.")
    ] = None,
    checkpoint: Annotated[Path, typer.Option(help="Training state, kept until training ends.")] = Path("checkpoint.pt"),
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Make a model folder in transformers' format: trained here, copied from a folder or the hub and checked, or with
    another model's config and weights drawn anew."""
    configure(threads, log)
    job = parse_argument(ModelJob, settings)
    if isinstance(job.model, UntrainedModel) != (like is not None):
        raise StudyError(f"models make: --like is for source untrained, and needed there; this is {job.model.source}")
    deterministic_torch(threads)
    if isinstance(job.model, TrainedModel):
        from universality.models.training import train_model

        assert job.training is not None
        train_model(name, job.model, job.training, tokens, tokenizer, checkpoint, out)
    elif isinstance(job.model, UntrainedModel):
        from universality.models.initialisation import write_untrained

        assert like is not None
        write_untrained(name, job.model, like, out)
    else:
        from universality.models.checkpoints import import_model

        import_model(name, job.model, tokenizer, out)
