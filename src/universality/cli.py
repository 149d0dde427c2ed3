"""The command line: `universality STAGE COMMAND`. Errors of the user's making are one line and a non-zero exit.

Command modules import nothing heavy until a command runs, so that threads can be set first and --help is quick.
"""

import gc
import importlib
import os
import sys
from collections.abc import Sequence

import typer

from universality.errors import StudyError

STAGES = (
    "corpus", "models", "activations", "saes", "features", "alignment", "circuits", "ablation", "analysis", "report",
    "study",
)  # fmt: skip

MODULES = {stage: [f"{stage}.commands"] for stage in STAGES} | {"align": ["alignment.show_commands"]}
MODULES["saes"] += ["saes.evaluation_commands", "saes.exchange"]


def application(groups: Sequence[str] = tuple(MODULES)) -> typer.Typer:
    """The commands of these groups, whose modules are imported."""
    app = typer.Typer(
        help="Which features and circuits do language models of different architectures share?",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for group in groups:
        commands, *more = (importlib.import_module(f"universality.{module}").app for module in MODULES[group])
        for others in more:
            commands.add_typer(others)  # without a name of their own: they stand among the group's commands
        app.add_typer(commands, name=group)
    return app


def main() -> None:
    # Imports make objects by the million, nearly all of which stay. Looking through them for garbage time and again,
    # and taking them apart in the end, takes a quarter of a short job's time.
    gc.set_threshold(100_000)
    status = _status()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads them any more, or their disk is full
        status = status or 1
    os._exit(status)


def _status() -> int:
    """Run the command line's command; its exit status."""
    named = sys.argv[1:2]
    try:
        application(named if named and named[0] in MODULES else tuple(MODULES))()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except StudyError as error:
        _tell(str(error))
    except MemoryError:
        _tell("out of memory; lower the batch sizes or the number of tokens in params.yaml")
    except OSError as error:
        _tell(f"{error.filename or 'input/output'}: {error.strerror or error}")
    return 1


def _tell(message: str) -> None:
    from universality.runtime import log

    line = " ".join(f"error: {message}".split())
    if log.handlers:
        log.error(line)
    else:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
