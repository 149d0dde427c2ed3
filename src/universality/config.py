"""A whole study's settings: params.yaml, checked before any job runs."""

from pathlib import Path

from pydantic import model_validator

from universality.activations.settings import ActivationsSettings
from universality.alignment.settings import AlignmentSettings, Comparison
from universality.circuits.settings import CircuitsSettings
from universality.corpus.settings import CorpusSettings
from universality.errors import StudyError
from universality.features.settings import FeaturesSettings
from universality.models.settings import ModelsSettings
from universality.report.settings import ReportSettings
from universality.saes.settings import SAEsSettings, TopKSettings
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
    report: ReportSettings

    @model_validator(mode="after")
    def _sections_fit_each_other(self):
        _check_comparisons(self)
        for name, variant in self.saes.variants.items():
            if isinstance(variant, TopKSettings) and variant.k > self.saes.training.d_sae:
                raise ValueError(
                    f"saes.variants.{name}.k: {variant.k} is more than saes.training.d_sae={self.saes.training.d_sae}"
                )
        if self.activations.buffer_rows < self.saes.training.batch_size:
            raise ValueError(
                f"activations.buffer_rows: {self.activations.buffer_rows} is less than "
                f"saes.training.batch_size={self.saes.training.batch_size}"
            )
        if self.circuits.sequence_length > self.corpus.sequence_length:
            raise ValueError(
                f"circuits.sequence_length: {self.circuits.sequence_length} is more than "
                f"corpus.sequence_length={self.corpus.sequence_length}"
            )
        return self


def _check_comparisons(study: Study) -> None:
    if all(comparison.setting == "neurons" for comparison in study.alignment.comparisons.values()):
        raise ValueError("alignment.comparisons: all compare neurons; at least one must compare SAE features")
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
    family_a, family_b = (study.models.zoo[side.model].family for side in (a, b))
    same_sae = a.variant == b.variant
    holds = {
        "sae_seed": (a.model == b.model and same_sae and a.seed != b.seed, "one model and variant, two SAE seeds"),
        "model_seed": (
            a.model != b.model and family_a == family_b and same_sae,
            "two models of a family, one variant",
        ),
        "cross_architecture": (family_a != family_b, "two models of different families"),
        "neurons": (a.model != b.model, "two models"),
        "shuffled": (True, ""),
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
