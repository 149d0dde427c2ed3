"""The command line: `universality STAGE COMMAND`. Errors of the user's making are one line and a non-zero exit.

Command modules import nothing heavy until a command runs, so that threads can be set first and --help is quick.
"""

import atexit
import gc
import importlib
import sys

import typer

from universality.alignment import show_commands
from universality.errors import StudyError
from universality.saes import evaluation_commands, exchange

STAGES = (
    "corpus", "models", "activations", "saes", "features", "alignment", "circuits", "ablation", "analysis", "report",
    "study",
)  # fmt: skip

app = typer.Typer(
    help="Which features and circuits do language models of different architectures share?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _stage in STAGES:
    _commands = importlib.import_module(f"universality.{_stage}.commands").app
    if _stage == "saes":
        for _more in (evaluation_commands, exchange):
            _commands.add_typer(_more.app)  # without a name of their own: they stand among the stage's commands
    app.add_typer(_commands, name=_stage)
app.add_typer(show_commands.app, name="align")


def main() -> None:
    # Imports make objects by the million, nearly all of which stay. Looking through them for garbage time and again,
    # and once more at the end, takes a quarter of a short job's time.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    try:
        app()
    except StudyError as error:
        _fail(str(error))
    except MemoryError:
        _fail("out of memory; lower the batch sizes or the number of tokens in params.yaml")
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")


def _fail(message: str) -> None:
    from universality.runtime import log

    line = " ".join(f"error: {message}".split())
    if log.handlers:
        log.error(line)
    else:
        print(line, file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
