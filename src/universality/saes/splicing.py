"""What a model loses when a site is replaced: by its reconstruction, by zero, by its mean.

Sites are replaced at kept tokens, at which dictionaries are trained, and left as they are at end-of-text tokens. Losses
are of the predictions of the next token that are made at kept tokens, in nats. What a dictionary reads is taken from
the run without replacements: before the replaced site the other runs do not differ from it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from universality.activations.sample import Sample
from universality.models.language_model import LanguageModel
from universality.runtime import progress
from universality.saes.placement import Placed, Source


class Losses(NamedTuple):
    """Of each prediction [T], float64: cross entropy with the site as it is, reconstructed, zero, at its mean; KL
    divergence of the prediction with the reconstruction from the clean one."""

    clean: np.ndarray
    spliced: np.ndarray
    zero: np.ndarray
    mean: np.ndarray
    kl: np.ndarray


class _CleanRun:
    """A model on one batch of sequences: its predictions, and the values [n, d] of some sites at kept tokens."""

    def __init__(self, model: LanguageModel, batch: Sample, sites: list[str]):
        self._model = model
        self._tokens = torch.from_numpy(batch.tokens.astype(np.int64))
        self._predicting = torch.from_numpy(batch.kept[:, :-1])
        self._kept = torch.from_numpy(np.flatnonzero(batch.kept)).to(model.device)
        run = model.run(self._tokens, capture=sites)
        self._log_p = F.log_softmax(run.logits[:, :-1], dim=-1)
        self.values = {site: value.flatten(0, 1)[self._kept].flatten(1).cpu() for site, value in run.captured.items()}
        self.losses = self._cross_entropies(run.logits)

    def ablated(self, site: str, rows: torch.Tensor) -> np.ndarray:
        """Cross entropies [T] with the site's values at kept tokens replaced by `rows` [n, d]."""
        return self._cross_entropies(self._replaced(site, rows))

    def spliced(self, site: str, rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The same, and KL divergences [T] from the clean predictions."""
        logits = self._replaced(site, rows)
        return self._cross_entropies(logits), self._divergences(logits)

    def _replaced(self, site: str, rows: torch.Tensor) -> torch.Tensor:
        def edit(value: torch.Tensor) -> torch.Tensor:
            new = value.clone(memory_format=torch.contiguous_format)
            new.flatten(0, 1)[self._kept] = rows.to(new).unflatten(1, new.shape[2:])
            return new

        return self._model.run(self._tokens, edits={site: edit}).logits

    # A sequence at a time: what is computed on the way for all at once would take several times the logits' memory.

    def _cross_entropies(self, logits: torch.Tensor) -> np.ndarray:
        found = []
        for targets, scores in zip(self._tokens[:, 1:].to(logits.device), logits, strict=True):
            found.append(F.cross_entropy(scores[:-1], targets, reduction="none"))
        return self._chosen(found)

    def _divergences(self, logits: torch.Tensor) -> np.ndarray:
        found = []
        for log_p, scores in zip(self._log_p, logits, strict=True):
            log_q = F.log_softmax(scores[:-1], dim=-1)
            found.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
        return self._chosen(found)

    def _chosen(self, of_positions: list[torch.Tensor]) -> np.ndarray:
        """Of numbers of all but the last position [L - 1] of each sequence, those of kept tokens [T], float64."""
        return torch.stack(of_positions).cpu()[self._predicting].double().numpy()


@torch.no_grad()
def measure_losses(
    models: Mapping[str, LanguageModel],
    sample: Sample,
    placed: list[Placed],
    means: Mapping[Source, torch.Tensor],
    batch_size: int,
) -> list[list[Losses]]:
    """Of each dictionary, the losses with each of the sites that it reconstructs replaced in turn.

    `models` are by name, `means` [d] of the sites. What is common to dictionaries is computed once.
    """
    sites = {
        name: sorted({site for one in placed for model, site in one.reads if model == name}) for name in sorted(models)
    }
    parts: list[list[list[Losses]]] = [[[] for _ in one.writes] for one in placed]
    starts = range(0, len(sample.tokens), batch_size)
    for start in progress(starts, f"{' + '.join(sites)} spliced, batches"):
        batch = sample.part(slice(start, start + batch_size))
        if not batch.n_rows:
            continue
        runs = {name: _CleanRun(models[name], batch, sites[name]) for name in sites}
        ablated: dict[Source, list[np.ndarray]] = {}
        for one, its_parts in zip(placed, parts, strict=True):
            x = torch.cat([runs[model].values[site] for model, site in one.reads], dim=1)
            for source, x_hat, collected in zip(one.writes, one.split(one.sae(x)), its_parts, strict=True):
                model, site = source
                run = runs[model]
                if source not in ablated:
                    constants = (torch.zeros_like(x_hat), means[source].expand_as(x_hat))
                    ablated[source] = [run.ablated(site, constant) for constant in constants]
                spliced, kl = run.spliced(site, x_hat)
                zero, mean = ablated[source]
                collected.append(Losses(run.losses, spliced, zero, mean, kl))
    return [[_joined(collected) for collected in its_parts] for its_parts in parts]


def predicting_documents(sample: Sample) -> np.ndarray:
    """The document [T] of the token at which each prediction is made, in the order of `Losses`."""
    return sample.documents[:, :-1][sample.kept[:, :-1]]


def _joined(parts: list[Losses]) -> Losses:
    return Losses(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
