"""`universality circuits`: which components do a task, and how."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from universality.circuits.settings import Attributing, Measuring, Published
from universality.circuits.tasks.settings import REPETITIONS, AnyTask
from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.runtime import configure, deterministic_torch
from universality.settings import Name, parse_argument
from universality.settings import Settings as SettingsBase

app = stage("Ablate and patch circuits.")


class TaskJob(SettingsBase):
    """One of circuits.tasks with its name, circuits.measuring and circuits.attribution."""

    name: Name
    task: AnyTask
    measuring: Measuring
    attribution: Attributing


@app.command(
    epilog=example(
        "circuits analyse --model models/neox --tokens corpus/tokens --tokenizer corpus/tokenizer --settings job.yaml "
        "--out circuits/induction/neox"
    )
)
def analyse(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    tokens: Annotated[Path, typer.Option(help="Tokens folder from `corpus tokens`.")],
    tokenizer: Annotated[Path, typer.Option(help="The folder of the model's tokenizer.")],
    settings: Settings,
    out: Out,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """All of a model on a task: paths beside their null, attribution, and for induction how the answer gets to the
    end."""
    configure(threads, log)
    job = parse_argument(TaskJob, settings)
    deterministic_torch(threads)
    from universality.circuits.circuit import Circuit
    from universality.circuits.tables import write_circuit
    from universality.circuits.tasks.make import make
    from universality.corpus.tokens import read_tokens
    from universality.models.loading import load_model

    measuring = job.measuring
    sequences = read_tokens(tokens, "evaluation")
    task = make(
        job.task, measuring.samples, sequences, tokenizer, measuring.task_seed, key=f"circuits.tasks.{job.name}"
    )
    circuit = Circuit(load_model(model), model.name, task._replace(name=job.name), measuring)
    write_circuit(circuit, job.attribution, job.task.kind in REPETITIONS, out)


class PublishedJob(SettingsBase):
    """circuits.published."""

    published: Annotated[list[Published], Field(min_length=1)]


@app.command(
    epilog=example(
        "circuits similarity --graph circuits/induction/neox/graph.json --graph circuits/induction/mamba/graph.json "
        "--out similarity.parquet"
    )
)
def similarity(
    graph: Annotated[list[Path], typer.Option(help="graph.json of `circuits analyse`, in its model's folder; repeat.")],
    out: Annotated[Path, typer.Option(help="Where the table goes.")],
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """How alike are the circuits of each two models?"""
    configure(threads, log)
    from universality.circuits.graph_similarity import write_similarity

    write_similarity(graph, out)


@app.command(
    epilog=example(
        "circuits published --settings published.yaml --circuit circuits/induction/mamba --out table.parquet"
    )
)
def published(
    settings: Settings,
    circuit: Annotated[list[Path], typer.Option(help="A folder of `circuits analyse`, in its task's; repeat.")],
    out: Annotated[Path, typer.Option(help="Where the table goes.")],
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Set published values beside those measured, as a table, and print it."""
    configure(threads, log)
    job = parse_argument(PublishedJob, settings)
    from universality.circuits.published import write_published

    write_published(job.published, circuit, out)
