"""`universality report`: metrics.json and the page."""

from pathlib import Path
from typing import Annotated

import typer

from universality.commands import Log, Out, Settings, Threads, example, stage
from universality.report.settings import ReportSettings
from universality.runtime import configure
from universality.settings import parse_argument

app = stage("Gather the results.")


@app.command(
    epilog=example(
        "report build --settings report.yaml --models models/neox --saes saes/metrics.parquet "
        "--alignment alignment/cross --circuits circuits/induction/neox --metrics metrics.json "
        "--out report"
    )
)
def build(
    settings: Settings,
    models: Annotated[list[Path], typer.Option(help="A model folder; repeat for more.")],
    saes: Annotated[Path, typer.Option(help="The table of all dictionaries' metrics.")],
    alignment: Annotated[list[Path], typer.Option(help="A comparison's folder; repeat.")],
    circuits: Annotated[list[Path], typer.Option(help="A folder of `circuits analyse`, in its task's; repeat.")],
    metrics: Annotated[Path, typer.Option(help="Where metrics.json goes.")],
    out: Out,
    crosscoders: Annotated[
        list[Path] | None, typer.Option(help="A crosscoder's features, NAME.features.parquet; repeat for more.")
    ] = None,
    decoders: Annotated[
        list[Path] | None, typer.Option(help="Shares matched by decoder, NAME_shares.parquet; repeat for more.")
    ] = None,
    similarity: Annotated[
        list[Path] | None, typer.Option(help="How alike circuits are, TASK.parquet; repeat for more.")
    ] = None,
    published: Annotated[Path | None, typer.Option(help="The table of `circuits published`.")] = None,
    ablation: Annotated[
        list[Path] | None, typer.Option(help="A folder of `ablation measure`, in its comparison's; repeat.")
    ] = None,
    kinds: Annotated[list[Path] | None, typer.Option(help="A folder of `analysis similarity`; repeat.")] = None,
    idiosyncratic: Annotated[
        list[Path] | None, typer.Option(help="A folder of `analysis idiosyncratic`, in its comparison's; repeat.")
    ] = None,
    spaces: Annotated[list[Path] | None, typer.Option(help="Whole layers compared, NAME.parquet; repeat.")] = None,
    threads: Threads = 1,
    log: Log = None,
) -> None:
    """Write metrics.json and a self-contained index.html with the figures."""
    configure(threads, log)
    parsed = parse_argument(ReportSettings, settings)
    from universality.report.page import build_report
    from universality.report.results import Inputs

    inputs = Inputs(
        models=models,
        saes=saes,
        crosscoders=crosscoders or [],
        alignment=alignment,
        decoders=decoders or [],
        spaces=spaces or [],
        circuits=circuits,
        similarity=similarity or [],
        published=published,
        ablation=ablation or [],
        kinds=kinds or [],
        idiosyncratic=idiosyncratic or [],
    )
    build_report(parsed, inputs, metrics, out)
