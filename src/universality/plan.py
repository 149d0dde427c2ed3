"""What a study asks the workflow to make: every result path and what each needs, from the settings alone."""

import itertools
from pathlib import Path
from typing import NamedTuple

from universality.activations.sites import layer_of, neuron_sites, residual_site, site_of_layer
from universality.alignment.settings import DECODERS, PARTS, SPACES, Comparison, Side
from universality.circuits.settings import SIMILARITY
from universality.circuits.tasks.settings import REPETITIONS
from universality.config import Study
from universality.corpus.settings import EVALUATION, TRAIN, AnyTokenizer
from universality.models.settings import UntrainedModel
from universality.saes.settings import CROSSCODERS, AnyVariant

OTHER_TOKENIZERS, OTHER_TOKENS = "other_tokenizers", "other_tokens"
"""Folders below results/corpus: further tokenizers, and what they make of the documents."""
_EVALUATION_RULES = ("saes_evaluation", "saes_evaluation_of_crosscoder", "saes_metrics")


class FeatureSet(NamedTuple):
    """One SAE's features: an SAE variant trained with one seed on one layer of one model."""

    model: str
    variant: str
    seed: int
    layer: int

    @property
    def path(self) -> str:
        """Its place below results/saes, and below a corpus's folder in results/features."""
        return f"{self.model}/{self.variant}/seed_{self.seed}/layer_{self.layer}"


class CorpusFeatures(NamedTuple):
    """An SAE's codes of the sample of a held-out corpus."""

    corpus: str
    features: FeatureSet

    @property
    def path(self) -> str:
        """Its place below results/features."""
        return f"{self.corpus}/{self.features.path}"


class Dictionary(NamedTuple):
    """Something to train in the saes stage: its place below results/saes, the (model, site) pairs that it reads, what
    it is, and the seed of its initial weights."""

    path: str
    sources: tuple[tuple[str, str], ...]
    variant: AnyVariant
    seed: int

    @property
    def models(self) -> list[str]:
        return sorted({model for model, _ in self.sources})

    @property
    def name(self) -> str:
        """Of its variant, or of the transcoder or crosscoder."""
        return self.path.split("/")[1]


class DictionaryJobs(NamedTuple):
    """A rule that trains dictionaries; `members`: all that a job of it trains in one pass, or none: one a job."""

    rule: str
    members: tuple[Dictionary, ...]


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

    lasting_folders = (
        f"results/corpus/{OTHER_TOKENIZERS}", f"results/corpus/{OTHER_TOKENS}", "results/ablation", "results/analysis",
    )  # fmt: skip
    """Those that may be empty but must be there, since dvc.yaml, which serves every study, names them."""

    def __init__(self, study: Study):
        self.study = study

    def layers(self, model: str) -> list[int]:
        return self.study.models.zoo[model].compared_layers

    def models(self) -> list[str]:
        return list(self.study.models.zoo)

    def tokenizers(self) -> dict[str, tuple[str | None, AnyTokenizer]]:
        """Place below results/corpus -> name, None for the study's own, and settings of each tokenizer."""
        others = self.study.corpus.other_tokenizers
        named = {f"{OTHER_TOKENIZERS}/{name}": (name, settings) for name, settings in others.items()}
        return {"tokenizer": (None, self.study.corpus.tokenizer), **named}

    def tokens(self) -> dict[str, str]:
        """Place below results/corpus of the tokens of each tokenizer -> the tokenizer's."""
        others = {f"{OTHER_TOKENS}/{name}": f"{OTHER_TOKENIZERS}/{name}" for name in self.study.corpus.other_tokenizers}
        return {"tokens": "tokenizer", **others}

    def tokenizer_of(self, model: str) -> str:
        """The folder of the model's tokenizer."""
        name = self.study.models.zoo[model].tokenizer
        return f"results/corpus/{OTHER_TOKENIZERS}/{name}" if name else "results/corpus/tokenizer"

    def tokens_of(self, model: str) -> str:
        """The folder of what the model's tokenizer makes of the documents."""
        name = self.study.models.zoo[model].tokenizer
        return f"results/corpus/{OTHER_TOKENS}/{name}" if name else "results/corpus/tokens"

    def shards(self, model: str, site: str, split: str) -> list[str]:
        n_shards = self.study.activations.n_shards(split)
        return [f"results/activations/{model}/{site}/{split}/shard_{shard}" for shard in range(n_shards)]

    def cached(self) -> list[Cached]:
        """Everything that the store holds: what dictionaries are trained on, unless they run the model themselves; the
        same sites of the documents held out from it; of all held-out documents what comparisons ask for."""
        cached = []
        read = [source for dictionary in self.dictionaries() for source in dictionary.sources]
        for model in sorted({model for model, _ in read} | set(self.compared_models())):
            trained_on = sorted({site for name, site in read if name == model}, key=_in_order)
            if trained_on and self.study.activations.train == "store":
                cached.append(Cached(model, TRAIN, trained_on))
            for corpus in self.study.corpus.documents.held_out:
                residuals = set(self._compared_residuals(model, corpus))
                if corpus == EVALUATION:
                    residuals |= set(trained_on)
                sites = sorted(residuals, key=_in_order) + self._all_neuron_sites(model, corpus)
                if sites:
                    cached.append(Cached(model, corpus, sites))
        return cached

    def _compared_residuals(self, model: str, corpus: str) -> list[str]:
        """The sites that some comparison looks at on the corpus, through SAEs or as they are."""
        alignment = self.study.alignment
        whole = [alignment.comparisons[name] for name in alignment.spaces.comparisons]
        found = any(side.model == model and side.basis != "neurons" for side in self._sides(corpus)) or any(
            comparison.corpus == corpus and model in (comparison.a.model, comparison.b.model) for comparison in whole
        )
        return [residual_site(layer) for layer in self.layers(model)] if found else []

    def _all_neuron_sites(self, model: str, corpus: str) -> list[str]:
        return [site for layer in self.layers(model) for site in self.neuron_sites(model, layer, corpus)]

    def cached_shards(self) -> list[str]:
        """The folders of all shards of the store."""
        return [path for c in self.cached() for site in c.sites for path in self.shards(c.model, site, c.split)]

    def neuron_sites(self, model: str, layer: int, corpus: str) -> list[str]:
        """The layer's inner sites, if a comparison looks at the model's neurons on the corpus."""
        models = [side.model for side in self._sides(corpus) if side.basis == "neurons"]
        return neuron_sites(self.study.models.zoo[model].family, layer) if model in models else []

    def residual_shards(self, model: str, corpus: str) -> list[str]:
        """Shards of the residual stream after every compared layer on a held-out corpus."""
        return [path for n in self.layers(model) for path in self.shards(model, residual_site(n), corpus)]

    def basis_sites(self, side: Side, corpus: str) -> list[str]:
        """The sites of all layers whose values are a side that is seen in a basis."""
        if side.basis == "neurons":
            return self._all_neuron_sites(side.model, corpus)
        return self._compared_residuals(side.model, corpus)

    def basis_shards(self, side: Side, corpus: str) -> list[str]:
        """Their shards on a held-out corpus."""
        return [path for site in self.basis_sites(side, corpus) for path in self.shards(side.model, site, corpus)]

    def row_shards(self, model: str, corpus: str) -> list[str]:
        """Shards of one site of a model that is compared on the corpus, which tell token and document of every row."""
        [site] = [c.sites[0] for c in self.cached() if (c.model, c.split) == (model, corpus)]
        return self.shards(model, site, corpus)

    def rules(self, stage: str) -> list[str]:
        """The rules whose jobs make what the stage makes."""
        if stage == "corpus":
            return [f"corpus_{made}" for made in ("documents", "tokenizer", "tokens")]
        if stage == "activations":
            return [cached.rule for cached in self.cached()]
        if stage == "circuits":
            return ["circuits", "circuits_similarity", "circuits_published"]
        if stage == "alignment":
            return ["alignment_match", "alignment", "alignment_tables", "alignment_decoders", "alignment_spaces"]
        if stage == "analysis":
            return [f"analysis_{kind}" for kind in ("features", "judged", "similarity", "idiosyncratic")]
        if stage == "saes":
            return [*(jobs.rule for jobs in self.dictionary_jobs()), *_EVALUATION_RULES]
        return [stage]

    def sets_of_saes(self) -> list[tuple[str, str, int]]:
        """(model, variant, seed) of the SAEs that comparisons or `saes.also` ask for, each once."""
        sides = [side for side in self._sides() if side.basis is None]
        also = [(one.model, one.variant, one.seed) for one in self.study.saes.also]
        return sorted({(side.model, str(side.variant), int(side.seed or 0)) for side in sides} | set(also))

    def dictionaries(self) -> list[Dictionary]:
        """All that the saes stage trains: SAEs, transcoders, crosscoders."""
        saes = self.study.saes
        found = [
            Dictionary(f.path, ((f.model, residual_site(f.layer)),), saes.variants[f.variant], f.seed)
            for one in self.sets_of_saes()
            for f in self._of_layers(*one)
        ]
        for name, job in saes.transcoders.items():
            kinds = job.dictionary.input, job.dictionary.target
            for f in self._of_layers(job.model, name, job.seed):
                sources = tuple((job.model, site_of_layer(kind, f.layer)) for kind in kinds)
                found.append(Dictionary(f.path, sources, job.dictionary, job.seed))
        for name, crosscoder in saes.crosscoders.items():
            sources = tuple((side.model, residual_site(side.layer)) for side in crosscoder.sides)
            found.append(Dictionary(f"{CROSSCODERS}/{name}", sources, crosscoder.dictionary, crosscoder.seed))
        return found

    def dictionary(self, path: str) -> Dictionary:
        """The one at a place below results/saes."""
        [found] = [dictionary for dictionary in self.dictionaries() if dictionary.path == path]
        return found

    def dictionary_jobs(self) -> list[DictionaryJobs]:
        """From the store, each is a job of its own; from running models, what reads the same sites shares a pass."""
        if self.study.activations.train == "store":
            return [DictionaryJobs("saes", ())]
        shared: dict[tuple, list[Dictionary]] = {}
        for dictionary in self.dictionaries():
            shared.setdefault(dictionary.sources, []).append(dictionary)
        return [DictionaryJobs(_rule_name(sources), tuple(members)) for sources, members in shared.items()]

    def evaluations(self) -> list[str]:
        """Places below results/saes, without ending, of what was measured of the dictionaries."""
        return [*self.evaluations_of_layers(), *self.crosscoders()]

    def evaluations_of_layers(self) -> list[str]:
        """Of SAEs and transcoders: all layers of a variant and seed share one."""
        found = {_evaluation_of(dictionary) for dictionary in self.dictionaries()}
        return sorted(found - set(self.crosscoders()))

    def crosscoders(self) -> list[str]:
        return [f"{CROSSCODERS}/{name}" for name in self.study.saes.crosscoders]

    def evaluated(self, evaluation: str) -> list[Dictionary]:
        """The dictionaries that one evaluation measures."""
        return [dictionary for dictionary in self.dictionaries() if _evaluation_of(dictionary) == evaluation]

    def crosscoder_tables(self) -> list[str]:
        """Tables of crosscoders' features."""
        return [f"results/saes/{path}.features.parquet" for path in self.crosscoders()]

    def _of_layers(self, model: str, variant: str, seed: int) -> list[FeatureSet]:
        return [FeatureSet(model, variant, seed, layer) for layer in self.layers(model)]

    def feature_sets(self) -> list[CorpusFeatures]:
        """What the features stage encodes: the SAEs that comparisons ask for on each corpus, each once."""
        return self._codes_of(self._comparisons())

    def _codes_of(self, comparisons: list[Comparison]) -> list[CorpusFeatures]:
        return sorted(
            {CorpusFeatures(c.corpus, f) for c in comparisons for side in (c.a, c.b) for f in self.side(side)}
        )

    def side(self, side: Side) -> list[FeatureSet]:
        """The side's feature sets, in the order of its layers; none if it is seen in a basis."""
        if side.variant is None or side.seed is None:
            return []
        return self._of_layers(side.model, side.variant, side.seed)

    def compared_models(self) -> list[str]:
        """Models that some comparison looks at."""
        return sorted({side.model for side in self._sides()})

    def circuit_models(self) -> list[str]:
        """Models whose circuits are looked for: an untrained one cannot do the task."""
        return [name for name, model in self.study.models.zoo.items() if not isinstance(model, UntrainedModel)]

    def circuits(self, task: str | None = None, published: bool = False) -> list[str]:
        """A folder for each task, or the one given, and model; or only those that published values are of."""
        tasks = self.study.circuits.tasks if task is None else [task]
        pairs = [(name, model) for name in tasks for model in self.circuit_models()]
        known = {(one.task, one.model) for one in self.study.circuits.published}
        return [f"results/circuits/{name}/{model}" for name, model in pairs if not published or (name, model) in known]

    def published_circuits(self) -> list[str]:
        """The table of published values, if the study has any."""
        return ["results/circuits/published.parquet"] if self.study.circuits.published else []

    def circuit_similarities(self) -> list[str]:
        """Of the tasks whose circuits are graphs."""
        tasks = [name for name, task in self.study.circuits.tasks.items() if task.kind in REPETITIONS]
        return [f"results/circuits/{SIMILARITY}/{name}.parquet" for name in tasks]

    def ablations(self) -> list[str]:
        """A folder for each side of each comparison whose features are ablated."""
        return [f"results/ablation/{name}/{side}" for name in self.study.ablation.comparisons for side in ("a", "b")]

    def analysed(self) -> list[CorpusFeatures]:
        """The feature sets whose contexts and measures are told, each once."""
        comparisons = [self.study.alignment.comparisons[name] for name in self.study.analysis.comparisons]
        return sorted(
            {CorpusFeatures(c.corpus, f) for c in comparisons for side in (c.a, c.b) for f in self.side(side)}
        )

    def analyses(self) -> list[str]:
        """Folders of the analysis stage: of feature sets, and of comparisons."""
        kinds = ("features", "judged") if self.study.analysis.judge else ("features",)
        return [
            *(f"results/analysis/{kind}/{codes.path}" for kind in kinds for codes in self.analysed()),
            *self.similarities(),
            *self.idiosyncratic(),
        ]

    def similarities(self) -> list[str]:
        return [f"results/analysis/similarity/{name}" for name in self.study.analysis.comparisons]

    def idiosyncratic(self) -> list[str]:
        """A folder for each side of each comparison."""
        names = self.study.analysis.comparisons
        return [f"results/analysis/idiosyncratic/{name}/{side}" for name in names for side in ("a", "b")]

    def results(self) -> list[str]:
        """Every file and folder that the study's rules make."""
        comparisons = self.study.alignment.comparisons
        return [
            *(f"results/corpus/{name}" for name in ("documents.parquet", *self.tokenizers(), *self.tokens())),
            *(f"results/models/{model}" for model in self.models()),
            *self.cached_shards(),
            *(f"results/saes/{dictionary.path}" for dictionary in self.dictionaries()),
            *(f"results/saes/{evaluation}.json" for evaluation in self.evaluations()),
            *self.crosscoder_tables(),
            "results/saes/metrics.parquet",
            *(f"results/features/{codes.path}" for codes in self.feature_sets()),
            *(path for name in comparisons for path in self.alignment_parts(name)),
            *self.comparison_folders(),
            *(f"results/alignment/{name}.parquet" for name in ("differences", "quality")),
            *self.decoder_tables(),
            *self.space_tables(),
            *self.circuits(),
            *self.circuit_similarities(),
            *self.published_circuits(),
            *self.ablations(),
            *self.analyses(),
            "results/report",
            "results/metrics.json",
        ]

    def alignment_blocks(self, side: Side) -> list[list[int]]:
        """The side's layers, as many at a time as one job compares."""
        layers, size = self.layers(side.model), self.study.alignment.block_layers
        return [layers[start : start + size] for start in range(0, len(layers), size)]

    def comparison_folders(self) -> list[str]:
        return [f"results/alignment/{name}" for name in self.study.alignment.comparisons]

    def decoder_tables(self, *kinds: str) -> list[str]:
        """Of comparisons whose sides are two SAEs of one model: "features" matched by decoder, and "shares" of them."""
        found = [n for n, c in self.study.alignment.comparisons.items() if c.of_saes and c.a.model == c.b.model]
        return [
            f"results/alignment/{DECODERS}/{name}_{kind}.parquet"
            for name in found
            for kind in kinds or ("features", "shares")
        ]

    def space_tables(self) -> list[str]:
        return [f"results/alignment/{SPACES}/{name}.parquet" for name in self.study.alignment.spaces.comparisons]

    def alignment_parts(self, name: str) -> list[str]:
        """What the jobs of a comparison write, a block of layers of each side a job."""
        comparison = self.study.alignment.comparisons[name]
        counts = [len(self.alignment_blocks(side)) for side in (comparison.a, comparison.b)]
        blocks = itertools.product(*map(range, counts))
        return [f"results/alignment/{PARTS}/{name}/a{i}_b{j}.safetensors" for i, j in blocks]

    def foreign_results(self) -> list[Path]:
        """Files below results/ that the study does not make: left by settings since changed, or by killed jobs."""
        made = {Path(path) for path in self.results()}
        known = {".gitignore", "README.md"}
        files = [path for path in Path("results").rglob("*") if path.is_file() and path.name not in known]
        return sorted(path for path in files if not made & {path, *path.parents})

    def _comparisons(self, corpus: str | None = None) -> list[Comparison]:
        """Those on the corpus, if one is given."""
        comparisons = self.study.alignment.comparisons.values()
        return [comparison for comparison in comparisons if corpus in (None, comparison.corpus)]

    def _sides(self, corpus: str | None = None) -> list[Side]:
        return [side for comparison in self._comparisons(corpus) for side in (comparison.a, comparison.b)]


def _evaluation_of(dictionary: Dictionary) -> str:
    path = dictionary.path
    return path if path.startswith(f"{CROSSCODERS}/") else f"{path.rpartition('/')[0]}/evaluation"


def _in_order(site: str) -> tuple[int, str]:
    """Sites by layer."""
    return layer_of(site), site


def _rule_name(sources: tuple[tuple[str, str], ...]) -> str:
    return "saes_" + "_".join(f"{model}_{site}" for model, site in sources).replace(".", "_")
