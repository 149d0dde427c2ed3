"""Is it the convolution or the state space? What a task loses when one way from position to position is cut.

Arora et al. 2025 (arXiv 2505.15105) hold that Mamba recalls associations by its short convolution rather than its
state-space model. Each way's sum over positions is split into the position's own part and what comes from others:

    conv   sum_k tap_k: the tap that reads the position itself, and the K - 1 earlier ones
    ssm    y_t = D u_t + C_t (write_t + the state before, decayed): what is read of the own write, and of earlier ones
    attn   z_t = w v_t + (z_t - w v_t): w is the weight that the head gives its own position on average, since the
           weight of one prompt tells of the others' scores; all else comes from other positions

Cut, at every position what comes from others is replaced by its mean over positions and clean prompts of the task (of
each tap, channel or head), or by zero; the own part is computed as ever. w is such a mean too. Everything after
recomputes. With all ways of all layers cut the last position sees only itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch

from universality.circuits.metrics import measure
from universality.circuits.tasks.base import Task
from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.models.taps import Edit

Way = Literal["conv", "ssm", "attn"]
Ablation = Literal["mean", "zero"]


class Cut(NamedTuple):
    """What the task comes to after a cut: metrics [S, metrics], not differences."""

    layer: int | None
    """None: all layers together."""
    ways: tuple[Way, ...]
    """Which were cut; none: the clean run."""
    values: torch.Tensor


def ways_of(model: LanguageModel) -> tuple[Way, ...]:
    """Raises StudyError if the model has ways from position to position that cannot be cut."""
    sites = {"conv": "mamba.0.conv_taps", "ssm": "mamba.0.y", "attn": "attn.0.z"}
    found = tuple(way for way in get_args(Way) if sites[way] in model.sites)
    if not found:
        raise StudyError(
            f"{model.family.name}: mixing of positions can be cut in state-space layers and attention only"
        )
    return found


def choices(model: LanguageModel) -> list[tuple[Way, ...]]:
    """What is cut together: each way alone, conv and ssm, and all there are."""
    ways = ways_of(model)
    together: list[tuple[Way, ...]] = [("conv", "ssm"), ways] if "ssm" in ways else []
    return list(dict.fromkeys([*((way,) for way in ways), *together]))


class MixingCuts:
    """Cuts of a model's ways for one task, in which means are taken over all prompts before any are measured."""

    def __init__(self, model: LanguageModel, task: Task, batch_size: int = 16):
        """Raises StudyError as `ways_of`."""
        self.model, self.task, self.batch_size = model, task, batch_size
        self.ways, self.layers = ways_of(model), range(model.n_layers)
        self._weights = self._own_weights() if "attn" in self.ways else {}

    def cuts(self, ablation: Ablation = "mean", layers: Sequence[int | None] | None = None) -> Iterator[Cut]:
        """The clean run, then every one of `choices` in each of `layers`: by default in all together (None), then in
        each. A run a cut. Raises StudyError for an unknown ablation or layer."""
        if ablation not in get_args(Ablation):
            raise StudyError(f"ablation {ablation!r}: allowed: {', '.join(get_args(Ablation))}")
        layers = [None, *self.layers] if layers is None else list(layers)
        for layer in layers:
            if layer is not None and layer not in self.layers:
                raise StudyError(f"layer {layer}: {self.model.family.name} has layers 0 to {len(self.layers) - 1}")
        means = self.means() if ablation == "mean" else None
        yield Cut(None, (), self._metrics({}))
        for layer in layers:
            for ways in choices(self.model):
                edits: dict[str, Edit] = {}
                for one in self.layers if layer is None else [layer]:
                    for way in ways:
                        edits |= self.edits(one, way, _put_in(None if means is None else means[one, way]))
                yield Cut(layer, ways, self._metrics(edits))

    def means(self) -> dict[tuple[int, Way], torch.Tensor]:
        """Layer and way -> what comes from other positions in clean runs, on average: conv [K - 1, C], ssm like y, attn
        [H, d_head]."""
        sums: dict[tuple[int, Way], torch.Tensor] = {}

        def adding(key: tuple[int, Way]) -> Edit:
            def add(others: torch.Tensor) -> torch.Tensor:
                sums[key] = sums.get(key, 0) + others.double().sum((0, 1))
                return others

            return add

        edits: dict[str, Edit] = {}
        for layer in self.layers:
            for way in self.ways:
                edits |= self.edits(layer, way, adding((layer, way)))
        self._look(edits)
        return {key: (total / self.task.clean.numel()).float() for key, total in sums.items()}

    def edits(self, layer: int, way: Way, exchange: Edit) -> dict[str, Edit]:
        """Edits by which what comes from other positions by one way, [B, L, ...], goes through `exchange`."""
        name = f"mamba.{layer}"
        if way == "conv":
            return {f"{name}.conv_taps": lambda taps: torch.cat([exchange(taps[:, :, :-1]), taps[:, :, -1:]], 2)}
        if way == "ssm":
            inputs = [f"{name}.{site}" for site in ("ssm_in", "delta", "B", "C")]
            return _split(inputs, f"{name}.y", partial(self._own_y, layer), exchange)
        return _split([f"attn.{layer}.v"], f"attn.{layer}.z", partial(self._own_z, layer), exchange)

    def _own_y(self, layer: int, seen: dict[str, torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        assert self.model.family.recurrence is not None
        run = self.model.family.recurrence(self.model.blocks[layer], layer, seen)
        alone = {key: getattr(run, key).flatten(0, 1)[:, None] for key in ("u", "delta", "B", "C")}
        return replace(run, **alone).scan(0, 1, None)[0].view(y.shape)  # every position a sequence of its own

    def _own_z(self, layer: int, seen: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
        v = seen[f"attn.{layer}.v"]
        return self._weights[layer][:, None] * v.repeat_interleave(z.shape[2] // v.shape[2], 2)

    def _own_weights(self) -> dict[int, torch.Tensor]:
        """Layer -> mean weight of each head for the position itself [H]."""
        sums: dict[int, torch.Tensor] = {}

        def look(layer: int, pattern: torch.Tensor) -> torch.Tensor:
            sums[layer] = sums.get(layer, 0) + pattern.diagonal(dim1=2, dim2=3).double().sum((0, 2))
            return pattern

        self._look({f"attn.{layer}.pattern": partial(look, layer) for layer in self.layers})
        return {layer: (total / self.task.clean.numel()).float() for layer, total in sums.items()}

    def _look(self, edits: dict[str, Edit]) -> None:
        with torch.inference_mode():
            for batch in self.task.batches(self.batch_size):
                self.model.run(batch.clean, edits=edits, logits=False)

    def _metrics(self, edits: dict[str, Edit]) -> torch.Tensor:
        with torch.inference_mode():
            batches = self.task.batches(self.batch_size)
            parts = [measure(self.model.run_to_last(batch.clean, edits=edits).logits, batch) for batch in batches]
        return torch.cat(parts).cpu()


def _split(
    inputs: Iterable[str],
    output: str,
    own: Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor],
    exchange: Edit,
) -> dict[str, Edit]:
    """Exchange what an output has beside its `own` part, which follows from the same run's inputs."""
    seen: dict[str, torch.Tensor] = {}

    def keep(site: str, value: torch.Tensor) -> torch.Tensor:
        seen[site] = value
        return value

    def edit(value: torch.Tensor) -> torch.Tensor:
        part = own(seen, value)
        seen.clear()
        return part + exchange(value - part)

    return {site: partial(keep, site) for site in inputs} | {output: edit}


def _put_in(mean: torch.Tensor | None) -> Edit:
    return torch.zeros_like if mean is None else lambda others: mean.expand_as(others)
