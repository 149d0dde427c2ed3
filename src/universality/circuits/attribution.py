"""Attribution patching: what patching a component would do to the metric, to first order, all components at once.

With v a component's value on the clean prompt, v' on the corrupted one and m the metric at the last position,

    score(v) = (v' - v) . dm/dv          [S] for every component

is the linear estimate of m(v patched to v') - m(clean) (Syed et al. 2023, arXiv 2310.10348: the Taylor expansion of
activation patching; here with its sign). The gradient is the total one: everything after v recomputes, as in path
patching's `total`. One forward and one backward pass give all components and positions.

The gradient at the clean prompt alone misleads where the metric is flat there, behind a saturated softmax say.
Integrated gradients take it along the straight path between the prompts' embeddings, e(a) = e' + a (e - e')
(Sundararajan et al. 2017, arXiv 1703.01365; for circuits EAP-IG, Hanna et al. 2024, arXiv 2403.17806). With m steps,
a_k = k / m and k = 1 .. m,

    ends   score(v) = (v' - v) . 1/m sum_k dm/dv(a_k)            EAP-IG; with m = 1 the above
    path   score(v) = sum_k (v(a_{k-1}) - v(a_k)) . dm/dv(a_k)   conductance (Dhamdhere et al. 2018, arXiv 1805.12233)

Summed over the embedding's positions both tend to m(corrupted) - m(clean), with an error in 1/m. Over another complete
cut, components that every path from the differing tokens to the metric crosses exactly once, only `path` does: a value
inside need not go straight from v' to v when the embedding does.

Components, and what a position of theirs is:

    embed                                           the token's place
    attn.L.z, by head                               the query's place
    mamba.L.state@-1                                the place that wrote (mamba.L.writes@-1): what it left in the state
                                                    that the last position reads, its decay on the way included
    mamba.L.conv_taps, by tap                       the output's place; tap k of K reads K - 1 - k places before
    mamba.L.{y, gate, out}, rwkv.L.out, mlp.L.out   the value's place

They are not a partition: mamba.L.out holds what the state, the taps and the gate do, and a later layer what an earlier
one does. What is summed should be a cut.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import torch

from universality.circuits.columns import METRICS
from universality.circuits.component import Component
from universality.circuits.metrics import measure
from universality.circuits.tasks.base import Task
from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.models.taps import template
from universality.runtime import progress

WRITERS = ("attn.z", "mamba.out", "rwkv.out", "mlp.out")
"""Kinds of sites that write to the residual stream; an MLP comes last in its layer."""
KINDS = ("mamba.conv_taps", "mamba.state@-1", "mamba.y", "mamba.gate", *WRITERS)
DIFFERENTIABLE = tuple(name for name in METRICS if name != "top1")
_BY_HEAD = ("attn.z", "attn.q", "attn.k", "attn.v", "mamba.conv_taps")
_RECURRENCE = ("ssm_in", "delta", "B", "C")

Values = dict[str, torch.Tensor]


class Attribution(NamedTuple):
    """`scores` [S, components, L]: estimated effects, patched minus clean, in units of the metric."""

    components: list[Component]
    scores: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """Summed over positions [S, components]."""
        return self.scores.sum(-1)

    def of(self, components: Iterable[Component]) -> "Attribution":
        """Of some components alone, in their order. Raises StudyError for one that was not scored."""
        wanted = list(components)
        for component in wanted:
            if component not in self.components:
                allowed = ", ".join(c.name for c in self.components)
                raise StudyError(f"component {component.name}: not scored; allowed: {allowed}")
        return Attribution(wanted, self.scores[:, [self.components.index(c) for c in wanted]])

    def at(self, place: torch.Tensor) -> torch.Tensor:
        """[S, components] at a position of each prompt's own: place [S]; nan where it is not in the prompt."""
        length = self.scores.shape[-1]
        index = place.clamp(0, length - 1)[:, None, None].expand(-1, self.scores.shape[1], 1)
        inside = (place >= 0) & (place < length)
        return self.scores.gather(2, index)[..., 0].where(inside[:, None], torch.nan)


def components(model: LanguageModel, kinds: tuple[str, ...] = KINDS, embed: bool = True) -> list[Component]:
    """The model's components of these kinds: the embedding, then layer by layer."""
    found = [Component("embed")] if embed else []
    for layer in range(model.n_layers):
        for kind in kinds:
            module, name = kind.split(".")
            site = f"{module}.{layer}.{name}"
            shape = model.sites.get(template(site))
            if shape is not None:
                numbers = range(int(shape[2])) if kind in _BY_HEAD else [None]
                found += [Component(site, number) for number in numbers]
    return found


def node_attribution(
    model: LanguageModel,
    task: Task,
    corruption: str,
    metric: str = "logit_diff",
    steps: int = 1,
    method: Literal["ends", "path"] = "ends",
    batch_size: int = 16,
) -> Attribution:
    """The scores of `components(model)`. `steps` = 1 is attribution patching, more integrate along the path.

    Memory is that of one backward pass over `batch_size` prompts, and for one state-space layer at a time a few arrays
    [batch, L, *state]. Scores are estimates: they may have any size and sign where the model is far from linear between
    the prompts. Raises StudyError for an unknown corruption or method, a metric without a gradient, and no steps.
    """
    check(task, corruption, metric, DIFFERENTIABLE, steps)
    if method not in ("ends", "path"):
        raise StudyError(f"method: {method!r} is unknown; allowed: ends, path")
    found = components(model)
    batches = progress(task.batches(batch_size), f"{task.name}, {corruption}: components attributed, batches")
    return Attribution(
        found, torch.cat([_scores(model, batch, corruption, metric, steps, method, found) for batch in batches])
    )


def _scores(
    model: LanguageModel, task: Task, corruption: str, metric: str, steps: int, method: str, found: list[Component]
) -> torch.Tensor:
    sites = list(dict.fromkeys(component.site for component in found))
    inner = [f"mamba.{n}.{kind}" for n in range(model.n_layers) for kind in _RECURRENCE if model.family.recurrence]
    scores: Values = {}
    start: Values = {}
    mean: Values = {}
    runs = along_path(model, task, corruption, metric, [*sites, *inner], [k / steps for k in range(steps + 1)])
    for k, (value, captured) in enumerate(runs):
        values = {site: x.detach() for site, x in captured.items()}
        if k > 0:
            gradients = dict(zip(sites, torch.autograd.grad(value, [captured[s] for s in sites]), strict=True))
            if method == "path":
                parts = {site: _by_position(model, site, start, values, gradients[site]) for site in sites}
                scores = {site: scores.get(site, 0) + parts[site] for site in sites}
            else:
                mean = {site: mean.get(site, 0) + gradients[site] / steps for site in sites}
        if k == 0 or method == "path":
            start = values
    if method == "ends":
        scores = {site: _by_position(model, site, start, values, mean[site]) for site in sites}
    rows = [scores[c.site] if c.head is None else scores[c.site][..., c.head] for c in found]
    return torch.stack(rows, 1).cpu()


def _by_position(model: LanguageModel, site: str, start: Values, end: Values, gradient: torch.Tensor) -> torch.Tensor:
    """(start - end) . gradient of one site: [S, L], or [S, L, heads] where it has heads or taps."""
    if "@" in site:  # what a position wrote is added to the state, so its gradient is the state's
        layer = int(site.split(".")[1])
        change = _writes(model, layer, start) - _writes(model, layer, end)
        return (change * gradient[:, None]).flatten(2).sum(2)
    product = (start[site] - end[site]) * gradient
    by_head = "{0}.{2}".format(*site.split(".")) in _BY_HEAD if "." in site else False
    return product.sum(-1) if by_head else product.flatten(2).sum(2)


def _writes(model: LanguageModel, layer: int, values: Values) -> torch.Tensor:
    """mamba.L.writes@-1, of one layer alone: all layers' at once would take the most memory of all."""
    assert model.family.recurrence is not None
    recurrence = model.family.recurrence(model.blocks[layer], layer, values)
    last = torch.full((len(recurrence.u),), recurrence.length - 1, device=recurrence.u.device)
    return recurrence.write() * recurrence.decay(last)


def along_path(
    model: LanguageModel, task: Task, corruption: str, metric: str, sites: Iterable[str], fractions: Iterable[float]
) -> Iterator[tuple[torch.Tensor, Values]]:
    """The metric summed over prompts, and the sites' values, differentiable, at each fraction of the way from the
    corrupted prompt's embedding (0) to the clean one's (1).
    """
    sites = list(sites)
    with torch.no_grad():
        prompts = (task.corrupted[corruption], task.clean)
        corrupted, clean = (model.run(p, capture=["embed"], logits=False).captured["embed"] for p in prompts)
    for fraction in fractions:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = torch.lerp(corrupted, clean, fraction).requires_grad_()
            # A state goes on through the tap only if it is edited; the kernel's own output does not depend on it.
            edits = {site: torch.clone for site in sites if "@" in site} | {"embed": lambda current, leaf=leaf: leaf}
            run = model.run_to_last(task.clean, capture=sites, edits=edits)
            value = measure(run.logits, task)[:, METRICS.index(metric)].sum()
        yield value, run.captured


def check(task: Task, corruption: str, metric: str, metrics: tuple[str, ...], steps: int = 1) -> None:
    """Raises StudyError for a corruption that the task does not have, a metric not among these, and no steps."""
    if corruption not in task.corrupted:
        raise StudyError(f"corruption: {task.name} has no {corruption!r}; allowed: {', '.join(task.corrupted)}")
    if metric not in metrics:
        raise StudyError(f"metric: {metric!r} cannot be taken; allowed: {', '.join(metrics)}")
    if steps < 1:
        raise StudyError(f"steps: {steps} is not at least 1")
