"""Dictionaries at the sites they are of: which of them they read, which they reconstruct, and do the widths fit."""

from pathlib import Path
from typing import Literal, NamedTuple

import torch

from universality.activations.store import ActivationStore, check_aligned
from universality.errors import StudyError
from universality.saes.base import SAE
from universality.saes.crosscoder import Crosscoder
from universality.saes.load import load_sae
from universality.saes.sources import Source, shards_by_source
from universality.saes.transcoder import PredictsTarget

Kind = Literal["sae", "transcoder", "crosscoder"]


class Evaluated(NamedTuple):
    """A dictionary to evaluate: its folder, its sources in the order of training, the name of its variant, its seed."""

    folder: Path
    sources: list[Source]
    variant: str
    seed: int


class Placed(NamedTuple):
    """A loaded dictionary. It reads the values of the sites `reads`, side by side, and reconstructs those of `writes`,
    which have `widths`."""

    evaluated: Evaluated
    sae: SAE
    kind: Kind
    reads: list[Source]
    writes: list[Source]
    widths: list[int]

    def check_width(self, source: Source, found: int, where: str) -> None:
        """Raises StudyError if the site, as found at `where`, has not the width that the dictionary has for it."""
        model, site = source
        due = dict(zip(self.writes, self.widths, strict=True)).get(source, self.sae.d_in)
        if found != due:
            raise StudyError(
                f"{self.evaluated.folder}: is of width {due}, but {model} {site} has width {found} in {where}"
            )

    def split(self, x_hat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The part [n, d] of each site in `writes` of reconstructions [n, d_out]."""
        return x_hat.split(self.widths, dim=1)


def place(evaluated: Evaluated) -> Placed:
    """Load the dictionary. Raises StudyError if it is not of as many sites as it has sources."""
    sae, sources = load_sae(evaluated.folder), evaluated.sources
    kind: Kind = "sae"
    due, first_written, widths = 1, 0, [sae.d_out]
    if isinstance(sae, Crosscoder):
        kind, due, widths = "crosscoder", len(sae.widths), sae.widths
    elif isinstance(sae, PredictsTarget):
        kind, due, first_written = "transcoder", 2, 1
    if len(sources) != due:
        named = ", ".join(f"{model}:{site}" for model, site in sources)
        raise StudyError(f"{evaluated.folder}: is a {kind} of {due} sites, but its sources are {named}")
    reads = sources[:1] if kind == "transcoder" else sources
    return Placed(evaluated, sae, kind, reads, sources[first_written:], widths)


def open_stores(placed: list[Placed], shards: list[Path]) -> dict[Source, ActivationStore]:
    """The held-out values of all sources.

    Raises StudyError if there are no shards of one, shards of something else, if the sources of a dictionary are not of
    the same tokens, or if a width does not fit.
    """
    found = shards_by_source([source for one in placed for source in one.evaluated.sources], shards)
    stores = {
        (model, site): ActivationStore(its_shards, model=model, site=site, split="evaluation")
        for (model, site), its_shards in found.items()
    }
    for one in placed:
        for source in one.evaluated.sources:
            check_aligned(found[one.evaluated.sources[0]], found[source])
            one.check_width(source, stores[source].d_in, str(found[source][0]))
    return stores
