"""A whole study's settings: params.yaml, checked before any job runs."""

from pathlib import Path
from typing import get_args

from pydantic import model_validator

from universality.ablation.settings import LOSS, AblationSettings
from universality.activations.settings import ActivationsSettings
from universality.alignment.settings import AlignmentSettings, Basis, Comparison
from universality.analysis.settings import AnalysisSettings
from universality.circuits.settings import CircuitsSettings
from universality.corpus.settings import TRAIN, CorpusSettings
from universality.errors import StudyError
from universality.features.settings import FeaturesSettings
from universality.models.settings import ModelsSettings, UntrainedModel
from universality.report.settings import ReportSettings
from universality.saes.settings import CROSSCODERS, AnyVariant, SAEsSettings, too_few_features
from universality.settings import Settings, parse, read_yaml


class Study(Settings):
    """One section a stage."""

    corpus: CorpusSettings
    models: ModelsSettings
    activations: ActivationsSettings
    saes: SAEsSettings
    features: FeaturesSettings
    alignment: AlignmentSettings
    circuits: CircuitsSettings
    ablation: AblationSettings
    analysis: AnalysisSettings
    report: ReportSettings

    @model_validator(mode="after")
    def _sections_fit_each_other(self):
        _check_corpora(self)
        _check_comparisons(self)
        _check_dictionaries(self)
        _check_circuits(self)
        if self.activations.buffer_rows < self.saes.training.batch_size:
            raise ValueError(
                f"activations.buffer_rows: {self.activations.buffer_rows} is less than "
                f"saes.training.batch_size={self.saes.training.batch_size}"
            )
        return self


def _check_corpora(study: Study) -> None:
    """Corpora and tokenizers that are asked for must exist."""
    tokenizers, held_out = study.corpus.other_tokenizers, study.corpus.documents.held_out
    for name, model in study.models.zoo.items():
        if model.tokenizer is not None and model.tokenizer not in tokenizers:
            known = ", ".join(tokenizers) or "none"
            raise ValueError(
                f"models.zoo.{name}.tokenizer: {model.tokenizer!r} is not in corpus.other_tokenizers: {known}"
            )
    for name, comparison in study.alignment.comparisons.items():
        if comparison.corpus not in held_out:
            raise ValueError(
                f"alignment.comparisons.{name}.corpus: {comparison.corpus!r} is no corpus of held-out documents: "
                f"{', '.join(held_out)}"
            )
    _check_names(list(study.models.zoo), [TRAIN, *held_out])


def _check_names(models: list[str], splits: list[str]) -> None:
    """A rule is named after a model and a split; no two pairs may give one name."""
    taken: dict[str, str] = {}
    for model in models:
        for split in splits:
            pair = f"model {model} and split {split}"
            other = taken.setdefault(f"{model}_{split}", pair)
            if other != pair:
                raise ValueError(f"corpus.documents.others: {pair} read like {other}; rename one of them")


def _check_dictionaries(study: Study) -> None:
    """What the saes section names must exist; the workflow's own folder names are no models'."""
    saes, zoo = study.saes, study.models.zoo
    if CROSSCODERS in zoo:
        raise ValueError(f"models.zoo.{CROSSCODERS}: results/saes keeps crosscoders under that name; choose another")
    named = [(f"saes.also[{number}]", one.model) for number, one in enumerate(saes.also)]
    named += [(f"saes.transcoders.{name}", job.model) for name, job in saes.transcoders.items()]
    named += [
        (f"saes.crosscoders.{name}.sides[{number}]", side.model)
        for name, job in saes.crosscoders.items()
        for number, side in enumerate(job.sides)
    ]
    for where, model in named:
        if model not in zoo:
            raise ValueError(f"{where}.model: {model!r} is not in models.zoo: {', '.join(zoo)}")
    for number, one in enumerate(saes.also):
        if one.variant not in saes.variants:
            known = ", ".join(saes.variants)
            raise ValueError(f"saes.also[{number}].variant: {one.variant!r} is not in saes.variants: {known}")
    for name in saes.variants.keys() & saes.transcoders.keys():
        raise ValueError(f"saes.transcoders.{name}: a variant has that name too; their results would share a folder")
    variants: list[tuple[str, AnyVariant]] = [(f"variants.{name}", variant) for name, variant in saes.variants.items()]
    variants += [(f"transcoders.{name}.dictionary", job.dictionary) for name, job in saes.transcoders.items()]
    variants += [(f"crosscoders.{name}.dictionary", job.dictionary) for name, job in saes.crosscoders.items()]
    for where, variant in variants:
        problem = too_few_features(variant, saes.d_sae(variant))
        if problem:
            raise ValueError(f"saes.{where}.{problem}")
    for name, job in saes.crosscoders.items():
        for side in job.sides:
            if side.layer >= zoo[side.model].n_layers:
                raise ValueError(
                    f"saes.crosscoders.{name}: layer {side.layer} is out of range: {side.model} has "
                    f"n_layers={zoo[side.model].n_layers}"
                )
        if len({(side.model, side.layer) for side in job.sides}) < len(job.sides):
            raise ValueError(f"saes.crosscoders.{name}.sides: one of them is named twice")
        tokenizers = {side.model: zoo[side.model].tokenizer or "corpus.tokenizer" for side in job.sides}
        if len(set(tokenizers.values())) > 1:
            found = ", ".join(f"{model} has {tokenizer}" for model, tokenizer in tokenizers.items())
            raise ValueError(f"saes.crosscoders.{name}.sides: must share one tokenizer, but {found}")
    if saes.evaluation.sequences > study.activations.evaluation_sequences:
        raise ValueError(
            f"saes.evaluation.sequences: {saes.evaluation.sequences} is more than "
            f"activations.evaluation_sequences={study.activations.evaluation_sequences}"
        )


def _check_circuits(study: Study) -> None:
    """Tasks must fit the sequences; what is published, or ablated, must be made here."""
    for name, task in study.circuits.tasks.items():
        length = getattr(task, "length", None)
        if length is not None and length > study.corpus.sequence_length:
            raise ValueError(
                f"circuits.tasks.{name}.length: {length} is more than "
                f"corpus.sequence_length={study.corpus.sequence_length}"
            )
    analysed = [name for name, model in study.models.zoo.items() if not isinstance(model, UntrainedModel)]
    for number, one in enumerate(study.circuits.published):
        if one.model not in analysed:
            raise ValueError(
                f"circuits.published[{number}].model: {one.model!r} is no model whose circuits are looked for: "
                f"{', '.join(analysed)}"
            )
    comparisons = study.alignment.comparisons
    if study.ablation.comparisons and LOSS in study.circuits.tasks:
        raise ValueError(f"circuits.tasks.{LOSS}: ablation's tables tell the loss by that name; choose another")
    for stage, names in (("ablation", study.ablation.comparisons), ("analysis", study.analysis.comparisons)):
        for name in names:
            if name not in comparisons or not comparisons[name].of_saes:
                known = ", ".join(n for n, c in comparisons.items() if c.of_saes)
                raise ValueError(f"{stage}.comparisons: {name!r} is no comparison of SAE features: {known}")
    if study.ablation.sequences > study.activations.evaluation_sequences:
        raise ValueError(
            f"ablation.sequences: {study.ablation.sequences} is more than "
            f"activations.evaluation_sequences={study.activations.evaluation_sequences}"
        )


def _check_comparisons(study: Study) -> None:
    if not any(comparison.of_saes for comparison in study.alignment.comparisons.values()):
        raise ValueError("alignment.comparisons: none is of SAE features on both sides; at least one must be")
    for name, comparison in study.alignment.comparisons.items():
        for label, side in (("a", comparison.a), ("b", comparison.b)):
            where = f"alignment.comparisons.{name}.{label}"
            if side.model not in study.models.zoo:
                raise ValueError(f"{where}.model: {side.model!r} is not in models.zoo: {', '.join(study.models.zoo)}")
            if side.variant is not None and side.variant not in study.saes.variants:
                known = ", ".join(study.saes.variants)
                raise ValueError(f"{where}.variant: {side.variant!r} is not in saes.variants: {known}")
        _check_setting(study, f"alignment.comparisons.{name}", comparison)


def _check_setting(study: Study, where: str, comparison: Comparison) -> None:
    """A setting is a claim about what the two sides share; it must hold."""
    a, b = comparison.a, comparison.b
    models = [study.models.zoo[side.model] for side in (a, b)]
    family_a, family_b = (model.family for model in models)
    n_untrained = sum(isinstance(model, UntrainedModel) for model in models)
    n_frozen = sum(side.variant is not None and study.saes.variants[side.variant].frozen_decoder for side in (a, b))
    same_sae = a.variant == b.variant
    holds = {
        "sae_seed": (a.model == b.model and same_sae and a.seed != b.seed, "one model and variant, two SAE seeds"),
        "model_seed": (
            a.model != b.model and family_a == family_b and same_sae and not n_untrained,
            "two trained models of a family, one variant",
        ),
        "cross_architecture": (
            family_a != family_b and not n_untrained and not n_frozen,
            "two trained models of different families, decoders not frozen",
        ),
        "untrained": (n_untrained == 2 and a.model != b.model, "two untrained models"),
        "frozen_decoder": (
            a.model != b.model and n_frozen == 2 and not n_untrained,
            "two trained models, frozen decoders on both sides",
        ),
        **dict.fromkeys(get_args(Basis), (a.model != b.model, "two models")),
        "any": (True, "anything"),
    }
    true, claim = holds[comparison.setting]
    if not true:
        raise ValueError(f"{where}: setting {comparison.setting} compares {claim}; these sides do not fit")


def load_study(path: Path | str) -> Study:
    """Raises StudyError: one line that names the key and what is allowed."""
    return check_study(read_yaml(path), str(path))


def check_study(value: object, where: str) -> Study:
    if not isinstance(value, dict):
        raise StudyError(f"{where}: a study is a mapping with the sections {', '.join(Study.model_fields)}")
    return parse(Study, value, where)
