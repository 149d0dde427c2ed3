"""Text that two tokenizers both cut: spans of whole tokens of either, and what features do over a span.

Models with different tokenizers are compared on the spans of the documents' text that tokens of both cover. A place in
a document is a boundary of a model where one of its tokens ends and its next begins, and where its rows' text begins or
ends. Spans lie between neighbouring boundaries of both models, with no text that either model's rows lack in between:
they are the finest pieces of text that consist of whole tokens of both.

    model a     |The|␣univers|al|ity|      spans, with their tokens of a and of b:
    model b     |The|␣un|iver|sality|      |The|  1 and 1,   |␣universality|  3 and 3

Gaps. Some tokenizers leave spaces out of their tokens' offsets. A token owns the gap before it, and the first token of
a document what stands before that. `own_gaps` applies this to whole documents. In rows, where text may be missing, only
gaps of one character between two rows' tokens are taken for the second one's space; wider ones are missing text.

Characters in parts. A token of byte-level BPE may be a part of a character, or end in one; its offsets cover the whole
character. A boundary inside a character is known by the character's end and the number of tokens still to come that
hold a part of it. It is a boundary of both models where this number is the same and both have the same number of tokens
in the character; the bytes of these tokens may still differ. Two equal tokenizations share every boundary.

Where one model's rows break off and the other's go on, the character at the break must have the same number of tokens
in both, or the break is no boundary: a part of it may be missing. Two cases pass for whole, since offsets do not tell
them: a character of which one part alone is kept, at a break, where the other model has it in one token; and one where
both models' rows break off, which is taken for the end of the document (or, likewise, its beginning).
"""

from typing import NamedTuple, Protocol

import numpy as np
import scipy.sparse

from universality.errors import StudyError

_GAP = 1  # characters; rows lack whole sequences, so what is missing between two of them is nearly always wider


class TextRows(Protocol):
    """Where in the documents each of T tokens is: `documents`, `starts`, `ends` [T], integers.

    A document is a row of documents.parquet; starts and ends are offsets in characters of its text.
    """

    @property
    def documents(self) -> np.ndarray: ...
    @property
    def starts(self) -> np.ndarray: ...
    @property
    def ends(self) -> np.ndarray: ...


class Spans(NamedTuple):
    """`of_a` [T_a], `of_b` [T_b]: each row's span, or -1; `documents`, `starts`, `ends` [N]: each span's text; int32.

    Spans are numbered by their first row of a. A span that begins or ends inside a character has all of it in its text.
    """

    of_a: np.ndarray
    of_b: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @property
    def n_spans(self) -> int:
        return len(self.documents)


class _Reading(NamedTuple):
    """A model's rows in the order of the text, and the boundaries between them.

    Of tokens [T]: `order` (their rows), `starts` with the gap before, `left` (the boundary that each begins at; it ends
    at the next one). Of boundaries: document, place, tokens `to_come` that hold a part of the character that ends
    there, tokens in the character `before` and `after`, and the `run` of contiguous text.
    """

    order: np.ndarray
    starts: np.ndarray
    left: np.ndarray
    documents: np.ndarray
    places: np.ndarray
    to_come: np.ndarray
    before: np.ndarray
    after: np.ndarray
    run: np.ndarray


def own_gaps(documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Starts [T] of tokens that own the gap before them, for whole documents [T], tokens in the order of the text.

    Give it the offsets of a tokenizer that trims spaces before sequences are cut and sampled: then no gap is in doubt.
    """
    return np.minimum(starts, _previous_ends(documents, ends, np.zeros_like(ends)))


def shared_spans(a: TextRows, b: TextRows) -> Spans:
    """The finest spans of text that consist of whole tokens of model a and of model b; the module states the rule.

    Rows are in the order of sequences, which may be any; the tokens of a sequence are in the order of the text. Where
    both models have the same rows, each row is its own span, and spans have the order of the rows. O(T log T).

    Raises StudyError if the rows of one model hold the same text twice, or offsets that no text can have. A repeat of
    no more than one character is not seen: it looks like parts of the character.
    """
    left, right = _read(a, "the first model"), _read(b, "the second model")
    at_a, at_b = _shared_boundaries(left, right)
    one_run = (np.diff(left.run[at_a]) == 0) & (np.diff(right.run[at_b]) == 0)
    piece_a, piece_b = _pieces(left, at_a), _pieces(right, at_b)

    # Pieces are what shared boundaries cut the text into; a row before the first has piece -1, the last number.
    first_row = np.full(len(at_a) + 1, len(left.order))
    np.minimum.at(first_row, piece_a, left.order)
    spans = np.flatnonzero(one_run)
    spans = spans[np.argsort(first_row[spans])]
    number = np.full(len(at_a) + 1, -1, dtype=np.int32)
    number[spans] = np.arange(len(spans), dtype=np.int32)

    begin, end = at_a[spans], at_a[spans + 1]
    starts = np.minimum(left.places[begin], left.starts[begin - left.run[begin]])
    text = (left.documents[begin], starts, left.places[end])
    return Spans(_by_row(left, number[piece_a]), _by_row(right, number[piece_b]), *(x.astype(np.int32) for x in text))


def _previous_ends(documents: np.ndarray, ends: np.ndarray, at_first: np.ndarray) -> np.ndarray:
    """Where the token before ends; `at_first` [T] for the first of a document."""
    previous = at_first.copy()
    previous[1:] = np.where(documents[1:] == documents[:-1], ends[:-1], at_first[1:])
    return previous


def _read(rows: TextRows, model: str) -> _Reading:
    documents, starts, ends = _checked(rows, model)
    order = _text_order(documents, starts, ends)
    documents, starts, ends = documents[order], starts[order], ends[order]
    _refuse_repeats(documents, starts, ends, model)
    previous = _previous_ends(documents, ends, starts)
    starts = np.where(starts - previous <= _GAP, np.minimum(starts, previous), starts)

    heads = starts > previous
    heads[_changes(documents)] = True
    run = np.cumsum(heads) - 1
    left = np.arange(len(order)) + run  # a run has one boundary more than tokens
    token = np.repeat(np.arange(len(order)), 1 + heads)
    opens = np.zeros(len(token), dtype=bool)
    opens[left[heads]] = True
    places = np.where(opens, starts[token], ends[token])
    counts = _counts(documents, starts, ends, documents[token], places, passed=token + ~opens)
    return _Reading(order, starts, left, documents[token], places, *counts, run[token])


def _checked(rows: TextRows, model: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    documents, starts, ends = (np.asarray(x) for x in (rows.documents, rows.starts, rows.ends))
    if documents.ndim != 1 or not documents.shape == starts.shape == ends.shape:
        raise StudyError(
            f"spans: {model} has documents of shape {documents.shape}, starts {starts.shape}, ends {ends.shape}; "
            "there must be one of each a row"
        )
    documents, starts, ends = (x.astype(np.int64) for x in (documents, starts, ends))
    wrong = (documents < 0) | (starts < 0) | (ends < starts)
    if wrong.any():
        row = int(wrong.argmax())
        raise StudyError(
            f"spans: {model}, row {row}: document {documents[row]}, characters {starts[row]} to {ends[row]} is no text"
        )
    return documents, starts, ends


def _changes(x: np.ndarray) -> np.ndarray:
    """Indices of the first of each group of equal neighbours."""
    return np.flatnonzero(np.concatenate([np.ones(min(len(x), 1), dtype=bool), x[1:] != x[:-1]]))


def _text_order(documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The rows in the order of the text.

    Stretches of rows that follow each other in the text are sorted as wholes: where a sequence ends inside a character,
    the parts that come with the text before it go before the parts that come with the text after it.
    """
    breaks = (documents[1:] != documents[:-1]) | (starts[1:] < starts[:-1]) | (ends[1:] < ends[:-1])
    breaks |= starts[1:] > ends[:-1]
    first = np.concatenate([np.zeros(min(len(starts), 1), dtype=np.int64), np.flatnonzero(breaks) + 1])
    length = np.diff(first, append=len(starts))
    by_text = np.lexsort((ends[first + length - 1], starts[first], documents[first]))
    first, length = first[by_text], length[by_text]
    return np.arange(len(starts)) + np.repeat(first - (np.cumsum(length) - length), length)


def _refuse_repeats(documents: np.ndarray, starts: np.ndarray, ends: np.ndarray, model: str) -> None:
    """Neighbours in the text may have one character in common, which both hold parts of; StudyError if more."""
    twice = (starts[1:] < ends[:-1] - 1) | (starts[1:] < starts[:-1]) | (ends[1:] < ends[:-1])
    twice &= documents[1:] == documents[:-1]
    if twice.any():
        row = int(twice.argmax()) + 1
        raise StudyError(
            f"spans: {model}: rows hold the text of document {documents[row]} at character {starts[row]} twice; each "
            "piece of text may be sampled once"
        )


def _counts(
    documents: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    of_boundary: np.ndarray,
    places: np.ndarray,
    passed: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(to_come, before, after) of boundaries at `places` in documents `of_boundary`, each after `passed` tokens.

    Tokens are counted over all documents: those of earlier documents cancel. A token holds a part of the character
    before a place if it begins before it and does not end earlier. Tokens without width, which end there too, are still
    to come as well: so no two boundaries of a model are the same.
    """
    stride = max(int(ends.max(initial=0)), 1) + 1
    begins, finishes, at = documents * stride + starts, documents * stride + ends, of_boundary * stride + places
    begun, ended = np.searchsorted(begins, at), np.searchsorted(finishes, at, "right")
    to_come = np.maximum(begun, ended) - passed
    return to_come, begun - np.searchsorted(finishes, at), np.searchsorted(begins, at, "right") - ended


def _shared_boundaries(a: _Reading, b: _Reading) -> tuple[np.ndarray, np.ndarray]:
    """Where the boundaries that both models have are among a's, and among b's; both ascending."""
    stride = max(int(x.places.max(initial=0)) for x in (a, b)) + 1
    most = max(int(x.to_come.max(initial=0)) for x in (a, b)) + 1
    key_a, key_b = ((x.documents * stride + x.places) * most + (most - 1 - x.to_come) for x in (a, b))
    _, at_a, at_b = np.intersect1d(key_a, key_b, assume_unique=True, return_indices=True)
    same_before, same_after = a.before[at_a] == b.before[at_b], a.after[at_a] == b.after[at_b]
    (first_a, last_a), (first_b, last_b) = _edges(a.run, at_a), _edges(b.run, at_b)
    shared = same_before | ((a.to_come[at_a] == 0) & (last_a == last_b))
    shared &= same_after | (first_a == first_b)
    return at_a[shared], at_b[shared]


def _edges(run: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each boundary `at` is the first, and the last, of its run."""
    changes = np.diff(run, prepend=-1, append=-1) != 0
    return changes[at], changes[at + 1]


def _pieces(reading: _Reading, shared: np.ndarray) -> np.ndarray:
    """The last shared boundary at or before each token's begin, -1 if none."""
    is_shared = np.zeros(len(reading.places), dtype=np.int64)
    is_shared[shared] = 1
    return np.cumsum(is_shared)[reading.left] - 1


def _by_row(reading: _Reading, of_token: np.ndarray) -> np.ndarray:
    of_row = np.empty_like(of_token)
    of_row[reading.order] = of_token
    return of_row


def pool(codes: scipy.sparse.csr_array, span: np.ndarray, n_spans: int) -> scipy.sparse.csr_array:
    """Codes [n_spans, F] of spans from codes [T, F] of tokens; `span` [T] is each token's span, or -1.

    A feature's value over a span is the one of largest magnitude over the span's tokens, of x and -x the positive; for
    codes that are never negative, their maximum. A span has an entry where one of its tokens has one. The result has
    the codes' dtype, and features ascend in a row; with one token a span its rows are those of `codes`, bit for bit.

    Raises StudyError if `span` is not one number a token, each from -1 to n_spans - 1.
    """
    tokens, begins = _tokens_of_spans(span, n_spans, codes.shape[0])
    rows = codes[tokens]
    indptr = rows.indptr[begins]
    joined = scipy.sparse.csr_array((rows.data, rows.indices, indptr), shape=(n_spans, codes.shape[1]))
    joined.sort_indices()

    first = _first_of_each(joined.indices, indptr)
    if len(first) == joined.nnz:
        return joined
    high, low = (largest.reduceat(joined.data, first) for largest in (np.maximum, np.minimum))
    values = np.where(high >= -low, high, low)
    indptr = np.searchsorted(first, indptr).astype(indptr.dtype)
    return scipy.sparse.csr_array((values, joined.indices[first], indptr), shape=joined.shape)


def _first_of_each(indices: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Places of the first entry of each feature in each row, of entries sorted by row and feature."""
    new = np.ones(len(indices), dtype=bool)
    new[1:] = indices[1:] != indices[:-1]
    new[indptr[:-1][np.diff(indptr) > 0]] = True
    return np.flatnonzero(new)


def pool_dense(values: np.ndarray, span: np.ndarray, n_spans: int) -> np.ndarray:
    """The same for dense values [T, d]: [n_spans, d], the value of largest magnitude; 0 in spans without tokens.

    Raises StudyError as `pool` does.
    """
    tokens, begins = _tokens_of_spans(span, n_spans, len(values))
    out = np.zeros((n_spans, *values.shape[1:]), values.dtype)
    sizes = np.diff(begins)
    filled = sizes > 0
    out[filled] = values[tokens[begins[:-1][filled]]]
    for number in range(1, int(sizes.max(initial=0))):  # spans have few tokens: the loop is short
        longer = np.flatnonzero(sizes > number)
        best, other = out[longer], values[tokens[begins[longer] + number]]
        larger = (np.abs(other) > np.abs(best)) | ((np.abs(other) == np.abs(best)) & (other > best))
        out[longer] = np.where(larger, other, best)
    return out


def _tokens_of_spans(span: np.ndarray, n_spans: int, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, span by span; where each span's begin among them [n_spans + 1]). Tokens of no span are left out."""
    span = np.asarray(span)
    if span.shape != (n_tokens,):
        raise StudyError(f"spans: numbers of shape {span.shape} for the values of {n_tokens} tokens")
    if n_tokens and not -1 <= span.min() <= span.max() < n_spans:
        raise StudyError(f"spans: numbers from {span.min()} to {span.max()}; they must be from -1 to {n_spans - 1}")
    order = np.argsort(span, kind="stable")
    tokens = order[np.count_nonzero(span < 0) :]
    return tokens, np.searchsorted(span[tokens], np.arange(n_spans + 1))
