"""The table of what a language model says of one SAE's features: judged.parquet."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from universality.analysis.chat import CachedChat, Chat, HttpChat, LocalChat
from universality.analysis.endpoint import Endpoint
from universality.analysis.held_out import HeldOut, Marked
from universality.analysis.judge import Judged, Shown, judge
from universality.analysis.settings import AnyJudge
from universality.runtime import log
from universality.storage import read_table, replacing, write_table

_TRIES = 50  # at rows where a feature is silent all around, for each that is wanted


def chat_of(settings: AnyJudge) -> Chat:
    """Raises StudyError if the environment does not name an endpoint, or there is no such model."""
    if settings.kind == "local":
        return LocalChat(settings.path)
    return HttpChat(Endpoint.of_environment(), timeout=settings.timeout, per_minute=settings.per_minute)


def write_judged(
    settings: AnyJudge, features: Path, held: HeldOut, tokenizer: PreTrainedTokenizerFast, cache: Path, out: Path
) -> None:
    """Of features drawn from those with contexts in the folder of `analysis features`; answers are kept in `cache`."""
    contexts = read_table(features / "contexts.parquet").to_pandas()
    n_top = contexts[contexts.kind == "top"].groupby("feature").size()
    live = n_top[n_top > 1].index.to_numpy()
    drawn = np.sort(live[np.random.default_rng(settings.seed).permutation(len(live))[: settings.features]])
    by_feature = dict(list(contexts[contexts.feature.isin(drawn)].groupby("feature")))
    shown = [_shown(int(f), by_feature[f], held, tokenizer, settings.tested, settings.seed) for f in drawn]
    chat = CachedChat(chat_of(settings), cache)
    judged = judge(chat, shown, settings.seed)
    log.info("judge: %d features, %d malformed answers", len(judged), sum(one.malformed for one in judged))
    with replacing(out) as folder:
        folder.mkdir()
        write_table(folder / "judged.parquet", _columns(drawn, judged) | {"judge": [chat.identity] * len(drawn)})


def _columns(features: np.ndarray, judged: list[Judged]) -> dict[str, object]:
    ratings = [one.rating for one in judged]
    return {
        "feature": features.astype(np.int32),
        "complexity": np.array([r.complexity if r else np.nan for r in ratings]),
        "monosemanticity": np.array([r.monosemanticity if r else np.nan for r in ratings]),
        "explanation": pa.array([r.explanation if r else None for r in ratings], pa.string()),
        "detection": np.array([one.detection for one in judged]),
        "fuzzing": np.array([one.fuzzing for one in judged]),
        "malformed": np.array([one.malformed for one in judged], dtype=np.int32),
    }


def _shown(feature: int, contexts, held: HeldOut, tokenizer: PreTrainedTokenizerFast, n: int, seed: int) -> Shown:
    """Top contexts to explain; of the others, which explanations are not made from, `n` to test on."""
    rng = np.random.default_rng([seed, feature])
    fires = np.zeros(len(held.rows.tokens), dtype=bool)
    fires[held.codes.indices[held.codes.indptr[feature] : held.codes.indptr[feature + 1]]] = True
    others = contexts[contexts.kind == "quantile"].row.to_numpy()
    active = np.sort(others[rng.permutation(len(others))[:n]])
    misplaced = (_misplaced(row, fires, held, tokenizer, rng) for row in active)
    return Shown(
        [held.marked(row, tokenizer) for row in contexts[contexts.kind == "top"].row],
        [held.marked(row, tokenizer) for row in active],
        [held.marked(row, tokenizer) for row in _silent(fires, held, n, rng)],
        [one for one in misplaced if one is not None],
    )


def _silent(fires: np.ndarray, held: HeldOut, n: int, rng: np.random.Generator) -> list[int]:
    """Rows in whose windows the feature fires nowhere; fewer than `n` where there are hardly any."""
    found: list[int] = []
    for row in rng.permutation(len(fires))[: _TRIES * n]:
        window = held.window(int(row))
        if not fires[window.start : window.stop].any():
            found.append(int(row))
        if len(found) == n:
            break
    return found


def _misplaced(
    row: int, fires: np.ndarray, held: HeldOut, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator
) -> Marked | None:
    """The row's text with a token marked where the feature is silent, if there is one."""
    silent = [other for other in held.window(row) if not fires[other]]
    return held.marked(row, tokenizer, int(rng.choice(silent))) if silent else None
