"""What a study needs of disk and time, from its settings alone.

Time is floating-point operations over the rate of a matrix product on this machine, all cores at work: what the bulk of
the computing would take if nothing held it up. Sizes of loaded models are those of their family's usual proportions.
"""

import time
from typing import NamedTuple

import numpy as np

from universality.activations.sites import site_width
from universality.alignment.settings import SIGNED, Side
from universality.config import Study
from universality.corpus.settings import AnyTokenizer, TrainedTokenizer
from universality.models.settings import AnyModel, TrainedModel, UntrainedModel
from universality.plan import Dictionary, Plan
from universality.saes.settings import AuxKSettings

_PRETRAINED_VOCABULARY = 50_304  # tokens of a tokenizer that is not trained here
_RELU_L0 = 64  # features a token that an SAE without a fixed number is taken to have
_CODE_BYTES = 12  # token, feature, value
_ROW_BYTES = 20  # token, document, position, start, end
# A block's weights in units of d_model^2, in a model of the family's usual proportions.
_BLOCK = {"gpt_neox": 12, "gpt2": 12, "llama": 16, "rwkv": 13, "mamba": 6, "mamba2": 6, "falcon_h1": 16}
_TIED = ("gpt2", "mamba", "mamba2")  # families whose embedding is the unembedding too
_DTYPE_BYTES = {"bf16": 2, "fp32": 4}
_MEASURED = 0.2  # seconds of matrix products


class Need(NamedTuple):
    """One line of the table: bytes on disk, floating-point operations."""

    stage: str
    what: str
    disk: float
    operations: float


def needs(study: Study) -> list[Need]:
    """Of all stages whose disk or time grows with the study's sizes; corpus, circuits, ablation, analysis
    and report are left out."""
    return [*_models(study), *_activations(study), *_saes(study), *_features(study), *_dense(study)]


def _vocabulary(study: Study, model: AnyModel) -> int:
    corpus = study.corpus
    tokenizer: AnyTokenizer = corpus.other_tokenizers[model.tokenizer] if model.tokenizer else corpus.tokenizer
    return tokenizer.vocab_size if isinstance(tokenizer, TrainedTokenizer) else _PRETRAINED_VOCABULARY


def _weights(study: Study, model: AnyModel) -> tuple[float, float]:
    """(all parameters, the blocks' alone)."""
    blocks = model.n_layers * _BLOCK[model.family] * model.d_model**2
    embedding = _vocabulary(study, model) * model.d_model
    return blocks + embedding * (1 if model.family in _TIED else 2), blocks


def _forward(study: Study, model: AnyModel, tokens: float) -> float:
    """Operations of the blocks; nothing that is cached needs the unembedding."""
    return 2 * _weights(study, model)[1] * tokens


def _models(study: Study) -> list[Need]:
    found = []
    for name, model in study.models.zoo.items():
        parameters, _ = _weights(study, model)
        tokens = model.steps * model.batch_size * study.corpus.sequence_length if isinstance(model, TrainedModel) else 0
        made = f"{_short(tokens)} tokens" if tokens else "untrained" if isinstance(model, UntrainedModel) else "loaded"
        what = f"{name}: {_short(parameters)} parameters, {made}"
        found.append(Need("models", what, 4 * parameters, 6 * parameters * tokens))
    return found


def _activations(study: Study) -> list[Need]:
    found = []
    settings = study.activations
    for cached in Plan(study).cached():
        model = study.models.zoo[cached.model]
        sequences = settings.n_sequences(cached.split)
        rows = sequences * (study.corpus.sequence_length - 1)
        values = sum(site_width(model.family, site, model.d_model) for site in cached.sites)
        disk = rows * (values * _DTYPE_BYTES[settings.dtype] + _ROW_BYTES * len(cached.sites))
        what = f"{cached.model} {cached.split}: {_short(rows)} rows of {len(cached.sites)} sites"
        operations = _forward(study, model, sequences * study.corpus.sequence_length)
        found.append(Need("activations", what, disk, operations))
    return found


def _saes(study: Study) -> list[Need]:
    """A row costs the encoder's product, and five more like it where much is active."""
    plan, training = Plan(study), study.saes.training
    rows = training.steps * training.batch_size
    passes = plan.dictionary_jobs()
    found = []
    for path, members in _by_kind(plan.dictionaries()).items():
        widths = _widths(study, members[0])
        reads, writes = (
            (widths[:1], widths[1:]) if members[0].variant.architecture == "transcoder" else (widths, widths)
        )
        d_sae = study.saes.d_sae(members[0].variant)
        parameters = len(members) * (sum(reads) + sum(writes) + 1) * d_sae
        products = 1 if isinstance(members[0].variant, AuxKSettings) else 6
        operations = len(members) * rows * products * 2.0 * sum(reads) * d_sae
        what = f"{path}: {len(members)} dictionaries, {_short(parameters)} parameters, {training.steps} steps"
        found.append(Need("saes", what, 4 * parameters, operations))
    if study.activations.train == "stream":
        models = [study.models.zoo[model] for jobs in passes for model, _ in jobs.members[0].sources]
        operations = sum(_forward(study, model, rows + study.activations.buffer_rows) for model in models)
        found.append(Need("saes", f"{len(models)} models run beside them", 0, operations))
    return found


def _by_kind(dictionaries: list[Dictionary]) -> dict[str, list[Dictionary]]:
    """Model and variant, or the crosscoder's name -> its dictionaries."""
    kinds: dict[str, list[Dictionary]] = {}
    for dictionary in dictionaries:
        kinds.setdefault("/".join(dictionary.path.split("/")[:2]), []).append(dictionary)
    return kinds


def _widths(study: Study, dictionary: Dictionary) -> list[int]:
    """Of the sites that it is trained on."""
    zoo = study.models.zoo
    return [site_width(zoo[model].family, site, zoo[model].d_model) for model, site in dictionary.sources]


def _features(study: Study) -> list[Need]:
    found = []
    rows = study.activations.evaluation_sequences * (study.corpus.sequence_length - 1)
    for (name, variant), count in _counts(study).items():
        d_sae = study.saes.d_sae(study.saes.variants[variant])
        operations = count * rows * 2 * study.models.zoo[name].d_model * d_sae
        disk = count * rows * _fired(study, variant) * _CODE_BYTES
        found.append(Need("features", f"{name}/{variant}: {_short(count * rows)} rows", disk, operations))
    return found


def _dense(study: Study) -> list[Need]:
    """Comparisons in a basis are dense products, in double precision; those of features are sparse."""
    found = []
    plan = Plan(study)
    rows = study.activations.evaluation_sequences * (study.corpus.sequence_length - 1)
    for name, comparison in study.alignment.comparisons.items():
        if not comparison.of_saes:
            a, b = (_side_width(study, plan, side, comparison.corpus) for side in (comparison.a, comparison.b))
            what = f"{name}: {_short(a)} by {_short(b)} {comparison.setting}"
            found.append(Need("alignment", what, 0, 2 * 2 * 2 * rows * a * b))
    return found


def _side_width(study: Study, plan: Plan, side: Side, corpus: str) -> int:
    """Features of all layers of a side."""
    if side.variant is not None:
        return len(plan.side(side)) * study.saes.d_sae(study.saes.variants[side.variant])
    model = study.models.zoo[side.model]
    width = sum(site_width(model.family, site, model.d_model) for site in plan.basis_sites(side, corpus))
    return width * (2 if side.basis in SIGNED else 1)


def _fired(study: Study, variant: str) -> int:
    settings = study.saes.variants[variant]
    return settings.k if isinstance(settings, AuxKSettings) else _RELU_L0


def _counts(study: Study) -> dict[tuple[str, str], int]:
    """(model, variant) -> how many times an SAE encodes a held-out corpus."""
    counts: dict[tuple[str, str], int] = {}
    for codes in Plan(study).feature_sets():
        key = (codes.features.model, codes.features.variant)
        counts[key] = counts.get(key, 0) + 1
    return counts


def product_rate() -> float:
    """Floating-point operations a second of a single-precision matrix product, the fastest of a moment's."""
    size = 1024
    x = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    fastest, end = float("inf"), time.perf_counter() + _MEASURED
    while (start := time.perf_counter()) < end:
        x @ x
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def total_line(found: list[Need], rate: float) -> str:
    disk, operations = sum(need.disk for need in found), sum(need.operations for need in found)
    return (
        f"This study needs about {_short(disk)}B of disk, and about {_time(operations / rate)} for its matrix products "
        f"at {_short(rate)}FLOP/s."
    )


def table(found: list[Need], rate: float) -> str:
    """A line a need, and their total."""
    lines = [("stage", "what", "disk", "time")]
    for need in found:
        lines.append((need.stage, need.what, f"{_short(need.disk)}B", _time(need.operations / rate)))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in lines]
    return "\n".join([*text, "", total_line(found, rate)])


def _short(number: float) -> str:
    """With the letter of thousands, millions and so on: 1234567 is "1.2 M"."""
    for letter in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:
            return f"{_digits(number)} {letter}"
        number /= 1000
    return f"{_digits(number)} P"


def _time(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{_digits(seconds / length)} {unit}"
    return f"{_digits(seconds)} s"


def _digits(number: float) -> str:
    """Two of them, or all before the point."""
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"
