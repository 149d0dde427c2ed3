"""`universality circuits`: which components do a task, and how."""

from pathlib import Path
from typing import Annotated

import typer

from universality.circuits.settings import Attributing, Measuring
from universality.circuits.tasks.settings import AnyTask
from universality.commands import Log, Settings, Threads, example, stage
from universality.runtime import configure, deterministic_torch
from universality.settings import Name, parse_argument
from universality.settings import Settings as SettingsBase

app = stage("Ablate and patch circuits.")

Model = Annotated[Path, typer.Option(help="Model folder.")]
Tokens = Annotated[Path, typer.Option(help="Tokens folder from `corpus tokens`.")]
Tokenizer = Annotated[Path, typer.Option(help="The folder of the model's tokenizer.")]
_INPUTS = "--model models/neox --tokens corpus/tokens --tokenizer corpus/tokenizer --settings job.yaml"


class TaskJob(SettingsBase):
    """One of circuits.tasks with its name, and circuits.measuring."""

    name: Name
    task: AnyTask
    measuring: Measuring


class AttributionJob(TaskJob):
    """The same, and circuits.attribution."""

    attribution: Attributing


@app.command(epilog=example(f"circuits paths {_INPUTS} --out paths.parquet"))
def paths(
    model: Model,
    tokens: Tokens,
    tokenizer: Tokenizer,
    settings: Settings,
    out: Annotated[Path, typer.Option(help="Where the effects go.")],
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Path patching: every sender to the logits, beside its null, and through the strongest receiver."""
    configure(threads, log)
    job = parse_argument(TaskJob, settings)
    deterministic_torch(threads)
    from universality.circuits.tables import write_paths

    write_paths(_circuit(job, model, tokens, tokenizer), out)


@app.command(
    epilog=example(
        f"circuits routes {_INPUTS} --off-by-one off_by_one.parquet --mixing mixing.parquet --graph graph.json"
    )
)
def routes(
    model: Model,
    tokens: Tokens,
    tokenizer: Tokenizer,
    settings: Settings,
    off_by_one: Annotated[Path, typer.Option(help="Where the off-by-one profile goes.")],
    mixing: Annotated[Path, typer.Option(help="Where the task after each cut goes.")],
    graph: Annotated[Path, typer.Option(help="Where the circuit as a graph goes.")],
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """How an induction's answer gets to the end: single writes exchanged, ways between positions cut, a graph."""
    configure(threads, log)
    job = parse_argument(TaskJob, settings)
    deterministic_torch(threads)
    from universality.circuits.tables import write_graph, write_routes

    circuit = _circuit(job, model, tokens, tokenizer)
    write_routes(circuit, off_by_one, mixing)
    write_graph(circuit, graph)


@app.command(epilog=example(f"circuits attribution {_INPUTS} --scores scores.parquet --curves curves.parquet"))
def attribution(
    model: Model,
    tokens: Tokens,
    tokenizer: Tokenizer,
    settings: Settings,
    scores: Annotated[Path, typer.Option(help="Where estimated effects go.")],
    curves: Annotated[Path, typer.Option(help="Where faithfulness, completeness and agreement go.")],
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Attribution patching, and the circuits of the largest scores run against path patching."""
    configure(threads, log)
    job = parse_argument(AttributionJob, settings)
    deterministic_torch(threads)
    from universality.circuits.tables import write_attribution

    write_attribution(_circuit(job, model, tokens, tokenizer), job.attribution, scores, curves)


@app.command(
    epilog=example(
        "circuits similarity --graph circuits/induction/neox/graph.json --graph circuits/induction/mamba/graph.json "
        "--out similarity.parquet"
    )
)
def similarity(
    graph: Annotated[list[Path], typer.Option(help="A graph of `circuits routes`, in its model's folder; repeat.")],
    out: Annotated[Path, typer.Option(help="Where the table goes.")],
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """How alike are the circuits of each two models?"""
    configure(threads, log)
    from universality.circuits.tables import write_similarity

    write_similarity(graph, out)


def _circuit(job: TaskJob, model: Path, tokens: Path, tokenizer: Path):
    from universality.circuits.tables import Circuit
    from universality.circuits.tasks.make import make
    from universality.corpus.tokens import read_tokens
    from universality.models.loading import load_model

    measuring = job.measuring
    sequences = read_tokens(tokens, "evaluation")
    task = make(
        job.task, measuring.samples, sequences, tokenizer, measuring.task_seed, key=f"circuits.tasks.{job.name}"
    )
    return Circuit(load_model(model), model.name, task._replace(name=job.name), measuring)
