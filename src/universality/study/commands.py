"""`universality study`: check a study's settings, tell what it needs, write its DVC stages."""

from pathlib import Path
from typing import Annotated

import typer

from universality.commands import Out, example, stage

StudyFile = Annotated[Path, typer.Option(help="The study's params.yaml.")]

app = stage("A study as a whole: its settings, its DVC stages.")


@app.command(epilog=example("study check params.yaml"))
def check(path: Annotated[Path, typer.Argument(help="The study's params.yaml.")] = Path("params.yaml")) -> None:
    """Check the settings and tell what the study will make."""
    from universality.config import load_study
    from universality.plan import Plan

    study = load_study(path)
    plan = Plan(study)
    for model in plan.models():
        print(f"{model}: layers {', '.join(map(str, plan.layers(model)))}")
    saes = {codes.features for codes in plan.feature_sets()}
    print(f"{len(saes)} SAEs, {len(study.alignment.comparisons)} comparisons")


@app.command(epilog=example("study needs --study studies/paper.yaml"))
def needs(study: StudyFile = Path("params.yaml")) -> None:
    """Tell about how much disk and time the study takes, by stage, before it starts."""
    from universality.config import load_study
    from universality.study.needs import needs, product_rate, table

    print(table(needs(load_study(study)), product_rate()))


@app.command(epilog=example("study rules activations"))
def rules(stage: Annotated[str, typer.Argument(help="The stage.")], study: StudyFile = Path("params.yaml")) -> None:
    """Name the rules of a stage, which follow from the study where their outputs do."""
    from universality.config import Study, load_study
    from universality.errors import StudyError
    from universality.plan import Plan

    if stage not in Study.model_fields:
        raise StudyError(f"study rules: {stage!r} is no stage; allowed: {', '.join(Study.model_fields)}")
    print(*Plan(load_study(study)).rules(stage))


@app.command(epilog=example("study dvc --root . --out dvc.yaml"))
def dvc(out: Out, root: Annotated[Path, typer.Option(help="The project's folder.")] = Path(".")) -> None:
    """Write dvc.yaml: one stage a rule, with the source files that each depends on."""
    from universality.storage import replacing
    from universality.study.dvc import dvc_yaml

    with replacing(out) as temporary:
        temporary.write_text(dvc_yaml(root.resolve()), encoding="utf8")


@app.command(epilog=example("study prune --yes"))
def prune(
    path: Annotated[Path, typer.Argument(help="The study's params.yaml.")] = Path("params.yaml"),
    yes: Annotated[bool, typer.Option("--yes", help="Remove them instead of failing where there are any.")] = False,
) -> None:
    """Find files in results/ that the study does not make, so that they are not recorded with it."""
    from universality.config import load_study
    from universality.errors import StudyError
    from universality.plan import Plan

    foreign = Plan(load_study(path)).foreign_results()
    if foreign and not yes:
        raise StudyError(
            f"{foreign[0]}: not made by this study ({len(foreign)} such files); "
            "`universality study prune --yes` removes them"
        )
    for file in foreign:
        file.unlink()
        print(f"removed {file}")
