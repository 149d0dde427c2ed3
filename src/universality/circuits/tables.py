"""All tables of a model on a task in a folder; docs/circuits.md describes them."""

from pathlib import Path

from universality.circuits.attribution_tables import write_attribution
from universality.circuits.circuit import Circuit
from universality.circuits.path_tables import write_paths
from universality.circuits.route_tables import write_graph, write_routes
from universality.circuits.settings import Attributing
from universality.storage import replacing


def write_circuit(circuit: Circuit, settings: Attributing, is_induction: bool, out: Path) -> None:
    """Those of how an answer gets to the end where the task is induction."""
    with replacing(out) as folder:
        folder.mkdir()
        write_paths(circuit, folder / "paths.parquet")
        write_attribution(circuit, settings, folder)
        if is_induction:
            write_routes(circuit, folder)
            write_graph(circuit, folder / "graph.json")
