"""A dictionary from a folder in whichever format it is."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from universality.errors import StudyError
from universality.saes.base import SAE
from universality.saes.folder import CFG, WEIGHTS, read_sae_lens
from universality.saes.formats import dictionary_learning, openmoss, sparsify


class Format(NamedTuple):
    """The library whose format it is, the files that a folder is known by, and what reads it."""

    library: str
    files: tuple[str, str]
    read: Callable[[Path], tuple[SAE, dict]]


FORMATS = (
    Format("sae-lens", (CFG, WEIGHTS), read_sae_lens),
    Format("dictionary_learning", (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS), dictionary_learning.read),
    Format("sparsify", (sparsify.CFG, sparsify.WEIGHTS), sparsify.read),
    Format("OpenMOSS", (openmoss.CONFIG, openmoss.WEIGHTS), openmoss.read),
)


def load_sae(folder: Path) -> SAE:
    """A dictionary ready to encode. Raises StudyError naming the folder if it cannot be read."""
    return load_with_metadata(folder)[0]


def load_with_metadata(folder: Path) -> tuple[SAE, dict]:
    """The dictionary, and what its folder tells of its model, site and making, under sae-lens' names."""
    for form in FORMATS:
        if all((folder / name).is_file() for name in form.files):
            return form.read(folder)
    known = "; ".join(f"{form.library}: {' and '.join(form.files)}" for form in FORMATS)
    raise StudyError(f"{folder}: is no folder of a dictionary; known formats: {known}")
