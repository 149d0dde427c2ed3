"""What one position "writes" for the last one in attention: its key and its value.

For the last position's query alone, k and v of one position are exchanged, in all heads of a layer, for those of the
corrupted run. The softmax is over the changed scores, so attention to all other positions changes too. The layer's z at
the last position is put in, and later layers recompute: the total effect. Since nothing else changes, only the last
position of later layers does.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from universality.circuits.component import Component
from universality.circuits.head_paths import HeadPaths
from universality.circuits.path_patching import Effect, Place, replace
from universality.circuits.tasks.base import Task
from universality.errors import StudyError
from universality.models.language_model import LanguageModel


class AttentionWrites(HeadPaths):
    """One batch of a task with one corruption. Offsets are counted from `place`, a name of task.positions."""

    def __init__(self, model: LanguageModel, task: Task, corruption: str, place: str = "B"):
        """Three passes. Raises StudyError for a model without attention, or whose z is not the plain softmax's, and for
        a task without that corruption or place."""
        if "attn.0.z" not in model.sites:
            raise StudyError(f"{model.family.name}: has no attention to patch")
        Place(place).of(task)
        self.layers, self.place = range(model.n_layers), place
        super().__init__(model, task, corruption)
        sites = [f"attn.{layer}.{site}" for layer in self.layers for site in "kv"]
        self._donated = model.run(self.put_in, capture=sites, logits=False).captured
        for layer in self.layers:
            z = self.clean[f"attn.{layer}.z"][:, -1]
            if not torch.allclose(self._last_z(layer), z, rtol=1e-4, atol=1e-5 * max(1.0, float(z.abs().max()))):
                raise StudyError(f"attn.{layer}.z: is not what q, k and v give by softmax; {model.family.name} differs")

    def further_sites(self) -> list[str]:
        return [*super().further_sites(), *(f"attn.{layer}.{site}" for layer in self.layers for site in "qkv")]

    def writes(self, offsets: Sequence[int], *, fast: bool = True) -> Iterator[Effect]:
        """Total effect of the key and value at each offset, of every layer. The sender attn.L.kv is no site: it stands
        for attn.L.k and attn.L.v together. Raises StudyError for an offset outside a sequence."""
        places = [Place(self.place, offset).of(self.task).to(self.model.device) for offset in offsets]
        for layer in self.layers:
            z = torch.stack([self._last_z(layer, at) for at in places])  # [offsets, S, H, d_head]
            found = self._by_last_position(layer, z) if fast and self._structured is not None else self._runs(layer, z)
            for offset, values in zip(offsets, found, strict=True):
                yield Effect(Component(f"attn.{layer}.kv"), None, "total", values, offset=offset)

    def _last_z(self, layer: int, at: torch.Tensor | None = None) -> torch.Tensor:
        """z at the last position [S, H, d_head], with the corrupted run's k and v at one position [S] if given.

        The last query looks at every position, so there is no mask."""
        q, k, v = (self.clean[f"attn.{layer}.{site}"] for site in "qkv")
        if at is not None:
            k, v = (
                replace(Component(site), self._donated[site], at)(clean)
                for site, clean in ((f"attn.{layer}.k", k), (f"attn.{layer}.v", v))
            )
        q, k, v = (x.transpose(1, 2) for x in (q[:, -1:], k, v))
        module = next(m for m in self.model.blocks[layer].modules() if hasattr(m, "universality_taps"))
        return F.scaled_dot_product_attention(q, k, v, scale=module.scaling, enable_gqa=True)[:, :, 0]

    def _runs(self, layer: int, z: torch.Tensor) -> Iterator[torch.Tensor]:
        """Metrics [S, metrics] of each z [N, S, H, d_head], a run of the model each."""
        site = f"attn.{layer}.z"
        for one in z:

            def edit(current: torch.Tensor, one: torch.Tensor = one) -> torch.Tensor:
                return torch.cat([current[:, :-1], one[:, None]], 1)

            yield self._effect(
                Component(site), None, "total", self.model.run_to_last(self.task.clean, edits={site: edit}).logits
            ).values

    def _by_last_position(self, layer: int, z: torch.Tensor) -> torch.Tensor:
        """The same for all at once [N, S, metrics], by the last position of the layers above."""
        written = self._parts.written(layer, z - self.clean[f"attn.{layer}.z"][:, -1]).sum(0)  # [N, S, D]
        rows = torch.arange(written.shape[1], device=written.device)
        return self._measured(self._onwards(layer, "attn", written[:, :, None], rows, self._length - 1))
