"""The induction circuit as a graph: components with roles, and what goes along its edges. induction_graph.py finds it
and says what the roles are."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from universality.circuits.component import LOGITS, Component

Role = Literal["mover", "inducer", "output"]
ROLES: tuple[Role, ...] = ("mover", "inducer", "output")


class Share(NamedTuple):
    """A mean effect as a share of the whole one, with the ends of its interval."""

    value: float
    low: float
    high: float


class Node(NamedTuple):
    """`depth` is layer / (n_layers - 1), 0 in a model of one layer."""

    component: Component
    depth: float
    role: Role
    share: Share


class Edge(NamedTuple):
    """`by`: q, k, v; "conv 1 back"; or "stream". `target` may be LOGITS."""

    source: Component
    target: Component
    by: str
    share: Share

    @property
    def kind(self) -> str:
        """ "to_inducer", or "own" where mover and inducer are one layer; "to_output", "to_logits"."""
        if self.by == "stream":
            return "to_logits" if self.target == LOGITS else "to_output"
        return "own" if self.source.layer == self.target.layer else "to_inducer"


class InductionGraph(NamedTuple):
    """`accuracy` is the share of clean prompts answered right; it `passes` if that is at least the least asked for.

    There are no nodes where it does not pass, nor where no inducer is found.
    """

    n_layers: int
    accuracy: float
    passes: bool
    nodes: tuple[Node, ...] = ()
    edges: tuple[Edge, ...] = ()

    def having(self, role: Role) -> list[Component]:
        return [node.component for node in self.nodes if node.role == role]

    def to_dict(self) -> dict:
        """For JSON: the same graph gives the same text. `graph_of_dict` reads it."""
        nodes = [
            {
                "component": node.component.name,
                "site": node.component.site,
                "head": node.component.head,
                "layer": node.component.layer,
                "depth": node.depth,
                "role": node.role,
                "share": node.share._asdict(),
            }
            for node in self.nodes
        ]
        edges = [
            {"source": e.source.name, "target": e.target.name, "by": e.by, "share": e.share._asdict()}
            for e in self.edges
        ]
        whole = {"n_layers": self.n_layers, "accuracy": self.accuracy, "passes": self.passes}
        return whole | {"nodes": nodes, "edges": edges}


def graph_of_dict(values: Mapping) -> InductionGraph:
    named = {node["component"]: Component(node["site"], node["head"]) for node in values["nodes"]}
    named[LOGITS.name] = LOGITS
    nodes = [Node(named[n["component"]], n["depth"], n["role"], Share(**n["share"])) for n in values["nodes"]]
    edges = [Edge(named[e["source"]], named[e["target"]], e["by"], Share(**e["share"])) for e in values["edges"]]
    return InductionGraph(values["n_layers"], values["accuracy"], values["passes"], tuple(nodes), tuple(edges))
