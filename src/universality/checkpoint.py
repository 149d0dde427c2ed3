"""The state of a long training in one file, from which an interrupted one goes on to the same bytes.

A checkpoint tells what it was made from. Going on from one that was made from anything else is never silent.
"""

from pathlib import Path
from typing import Any

import torch

from universality.errors import StudyError
from universality.runtime import log
from universality.settings import OnMismatch
from universality.storage import replacing


def write_checkpoint(path: Path, made_from: dict[str, str], state: dict[str, Any]) -> None:
    """`made_from`: everything that decides on the training's course, by name."""
    with replacing(path) as temporary:
        torch.save({"made_from": made_from, "state": state}, temporary)


def read_checkpoint(path: Path, made_from: dict[str, str], on_mismatch: OnMismatch) -> dict[str, Any] | None:
    """The state, None if there is none to go on from.

    A checkpoint that is damaged or made from something else is refused, a StudyError that names what differs, or left
    alone for the training to start anew, which the log tells.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, weights_only=True)
        found, state = content["made_from"], content["state"]
        differing = [name for name in made_from if found.get(name) != made_from[name]]
        problem = f"was made from other {', '.join(differing)}" if differing else ""
    except Exception:  # a damaged file makes torch raise whatever its reading ran into
        state, problem = None, "is damaged"
    if not problem:
        return state
    if on_mismatch is OnMismatch.refuse:
        raise StudyError(f"{path}: {problem}; remove it to start anew")
    log.info("%s %s; training starts anew", path, problem)
    return None
