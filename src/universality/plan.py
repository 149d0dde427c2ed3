"""What a study asks the workflow to make: every result path and what each needs, from the settings alone."""

from pathlib import Path
from typing import NamedTuple

from universality.activations.sites import neuron_sites, residual_site
from universality.alignment.settings import Comparison, Side
from universality.config import Study
from universality.models.settings import STATE_SPACE_FAMILIES


class FeatureSet(NamedTuple):
    """One SAE's features: an SAE variant trained with one seed on one layer of one model."""

    model: str
    variant: str
    seed: int
    layer: int

    @property
    def path(self) -> str:
        """Its place below results/saes and results/features."""
        return f"{self.model}/{self.variant}/seed_{self.seed}/layer_{self.layer}"


class Cached(NamedTuple):
    """What one run of a model over a shard of the sample writes: the values of these sites."""

    model: str
    split: str
    sites: list[str]

    @property
    def rule(self) -> str:
        """The rule whose jobs are the shards: one of its own, since what such a job writes follows from the study."""
        return f"activations_{self.model}_{self.split}"


class Plan:
    """Paths are relative to the study's folder."""

    def __init__(self, study: Study):
        self.study = study

    def layers(self, model: str) -> list[int]:
        return self.study.models.zoo[model].compared_layers

    def models(self) -> list[str]:
        return list(self.study.models.zoo)

    def shards(self, model: str, site: str, split: str) -> list[str]:
        n_shards = self.study.activations.n_shards(split)
        return [f"results/activations/{model}/{site}/{split}/shard_{shard}" for shard in range(n_shards)]

    def cached(self) -> list[Cached]:
        """Everything that the store holds: what SAEs are trained on, unless they run the model themselves; held-out
        residual streams for their codes; held-out neurons where they are compared."""
        cached = []
        for model in self.compared_models():
            layers = self.layers(model)
            residual = [residual_site(layer) for layer in layers if model in self.models_with_features()]
            neurons = [site for layer in layers for site in self.neuron_sites(model, layer)]
            if residual and self.study.activations.train == "store":
                cached.append(Cached(model, "train", residual))
            cached.append(Cached(model, "evaluation", residual + neurons))
        return cached

    def cached_shards(self) -> list[str]:
        """The folders of all shards of the store."""
        return [path for c in self.cached() for site in c.sites for path in self.shards(c.model, site, c.split)]

    def neuron_sites(self, model: str, layer: int) -> list[str]:
        """The layer's inner sites, if a comparison looks at the model's neurons."""
        sides = [side.model for c in self._comparisons() if c.setting == "neurons" for side in (c.a, c.b)]
        return neuron_sites(self.study.models.zoo[model].family, layer) if model in sides else []

    def neuron_shards(self, model: str) -> list[str]:
        """Evaluation shards of all the model's neuron sites."""
        sites = [site for layer in self.layers(model) for site in self.neuron_sites(model, layer)]
        return [path for site in sites for path in self.shards(model, site, "evaluation")]

    def row_shards(self, model: str) -> list[str]:
        """Evaluation shards of one site of a compared model, which tell token and document of every row."""
        [site] = [c.sites[0] for c in self.cached() if (c.model, c.split) == (model, "evaluation")]
        return self.shards(model, site, "evaluation")

    def rules(self, stage: str) -> list[str]:
        """The rules whose jobs make what the stage makes."""
        if stage == "corpus":
            return [f"corpus_{made}" for made in ("documents", "tokenizer", "tokens")]
        return [cached.rule for cached in self.cached()] if stage == "activations" else [stage]

    def feature_sets(self) -> list[FeatureSet]:
        """The SAEs that the comparisons ask for, each once."""
        sides = [side for c in self._comparisons() if c.setting != "neurons" for side in (c.a, c.b)]
        return sorted({features for side in sides for features in self.side(side)})

    def side(self, side: Side) -> list[FeatureSet]:
        """The side's feature sets, in the order of its layers; none where neurons are compared."""
        if side.variant is None or side.seed is None:
            return []
        return [FeatureSet(side.model, side.variant, side.seed, layer) for layer in self.layers(side.model)]

    def models_with_features(self) -> list[str]:
        """Models whose train activations some SAE needs."""
        return sorted({features.model for features in self.feature_sets()})

    def compared_models(self) -> list[str]:
        """Models that some comparison looks at."""
        return sorted({side.model for c in self._comparisons() for side in (c.a, c.b)})

    def state_space_models(self) -> list[str]:
        return [name for name, model in self.study.models.zoo.items() if model.family in STATE_SPACE_FAMILIES]

    def results(self) -> list[str]:
        """Every file and folder that the study's rules make."""
        features = [f.path for f in self.feature_sets()]
        comparisons = self.study.alignment.comparisons
        return [
            *(f"results/corpus/{name}" for name in ("documents.parquet", "tokenizer", "tokens")),
            *(f"results/models/{model}" for model in self.models()),
            *self.cached_shards(),
            *(f"results/{stage}/{path}" for stage in ("saes", "features") for path in features),
            *(f"results/alignment/{name}.{kind}" for name in comparisons for kind in ("parquet", "json")),
            *(f"results/circuits/induction_{model}.parquet" for model in self.models()),
            *(f"results/circuits/off_by_one_{model}.parquet" for model in self.state_space_models()),
            "results/report",
            "results/metrics.json",
        ]

    def foreign_results(self) -> list[Path]:
        """Files below results/ that the study does not make: left by settings since changed, or by killed jobs."""
        made = {Path(path) for path in self.results()}
        known = {".gitignore", "README.md"}
        files = [path for path in Path("results").rglob("*") if path.is_file() and path.name not in known]
        return sorted(path for path in files if not made & {path, *path.parents})

    def _comparisons(self) -> list[Comparison]:
        return list(self.study.alignment.comparisons.values())
