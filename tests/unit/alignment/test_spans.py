import itertools
from typing import NamedTuple

import numpy as np
import pytest
import scipy.sparse
from tokenizers import processors

from universality.alignment.spans import own_gaps, pool, pool_dense, shared_spans
from universality.corpus.tokenizer import train_bpe
from universality.errors import StudyError

ENGLISH = """Two models may learn the same features although nobody asked them to, and whether they did is a question
about their activations, not about their weights. A feature fires on some tokens of a document and stays silent on the
others; when a feature of another model fires on nearly the same places, and about as strongly, we say that the features
correspond. The comparison becomes harder as soon as the tokenizers differ: one cuts “universality” into three pieces,
the other keeps it whole, and no row of one table belongs to a single row of the other. What both of them share is the
text. Between any two neighbouring cuts that they have in common lies a stretch of whole tokens of either, however many
these are, and the strongest response within this stretch can be compared. Punctuation, numbers such as 1024 or 3.14,
rare names (Kolmogorov, Nyquist) and quotations make such stretches short or long; ordinary words mostly stay alone."""
MIXED = [
    "The café was naïve about the “universality” of features; Zoë's façade said 日本語 and 東京 twice: 東京!",
    "Emoji 😀😃 come as pairs 🇫🇷, families 👩‍👩‍👧, and plain words.    Indented   text, ﬁnally; naïve naïve.",
    "déjà vu, crème brûlée, Привет мир, 안녕하세요, ελληνικά — dashes… and 漢字かな交じり文 ends in 😀",
    "É",
    "ordinary words only, and the same ordinary words again",
]


class Rows(NamedTuple):
    documents: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __getitem__(self, rows):
        return Rows(*(x[rows] for x in (self.documents, self.starts, self.ends)))


def rows_of(*tokens):
    """Rows of (document, start, end)."""
    return Rows(*np.array(tokens, dtype=np.int32).reshape(-1, 3).T)


def sampled(n_tokens, length, share, rng):
    """Which tokens, laid end to end, are rows: a random share of their sequences in random order."""
    sequences = [np.arange(start, min(start + length, n_tokens)) for start in range(0, n_tokens, length)]
    chosen = rng.permutation(len(sequences))[: max(1, round(share * len(sequences)))]
    return np.concatenate([sequences[i] for i in chosen])


class Cut(NamedTuple):
    """A random byte-level tokenization: `rows` in the order of the text; the bytes [T, 2] of their document's text."""

    rows: Rows
    byte_ranges: np.ndarray


def random_cut(widths, mean_bytes, rng):
    """Cut documents, whose characters have `widths` bytes, anywhere between two bytes."""
    tokens, ranges = [], []
    for document, width in enumerate(widths):
        character = np.repeat(np.arange(len(width)), width)
        inner = np.flatnonzero(rng.random(len(character) - 1) < 1 / mean_bytes) + 1
        bounds = [0, *inner.tolist(), len(character)]
        for first, last in itertools.pairwise(bounds):
            tokens.append((document, character[first], character[last - 1] + 1))
            ranges.append((first, last))
    return Cut(rows_of(*tokens), np.array(ranges))


def random_widths(rng, n_documents=3, longest=12, most_bytes=4):
    return [rng.integers(1, most_bytes + 1, rng.integers(1, longest)) for _ in range(n_documents)]


def runs_of(rows, order):
    """The rows in the order of the text, cut where text is missing."""
    runs, last = [], None
    for row in order:
        document, start, end = (int(x[row]) for x in rows)
        if last is None or document != last[0] or start > last[1]:
            runs.append([])
        runs[-1].append((document, start, end, int(row)))
        last = document, end
    return runs


def boundary(run, i):
    """(what names the boundary before token i of the run, tokens that hold the character before it, and after it)."""
    place = run[i - 1][2] if i else run[0][1]
    to_come = sum(start < place or end <= place for _, start, end, _ in run[i:])
    before = sum(start <= place - 1 < end for _, start, end, _ in run)
    after = sum(start <= place < end for _, start, end, _ in run)
    return (run[0][0], place, to_come), before, after


def reference_spans(a, order_a, b, order_b):
    """{(rows of a, rows of b)} by trying each run of a with each of b, boundary by boundary."""
    found = set()
    for run_a in runs_of(a, order_a):
        for run_b in runs_of(b, order_b):
            of_b = {boundary(run_b, j)[0]: (j, *boundary(run_b, j)[1:]) for j in range(len(run_b) + 1)}
            shared = []
            for i in range(len(run_a) + 1):
                name, before, after = boundary(run_a, i)
                if name not in of_b:
                    continue
                j, other_before, other_after = of_b[name]
                if before != other_before and (name[2] or (i == len(run_a)) != (j == len(run_b))):
                    continue
                if after != other_after and (i == 0) != (j == 0):
                    continue
                shared.append((i, j))
            for (i, j), (k, m) in itertools.pairwise(shared):
                found.add((tuple(t[3] for t in run_a[i:k]), tuple(t[3] for t in run_b[j:m])))
    return found


def found_spans(spans):
    return [
        (tuple(np.flatnonzero(spans.of_a == s).tolist()), tuple(np.flatnonzero(spans.of_b == s).tolist()))
        for s in range(spans.n_spans)
    ]


def in_row_order(found):
    """Rows of a span in ascending order, spans by their first row of a."""
    return sorted(((tuple(sorted(x)), tuple(sorted(y))) for x, y in found), key=lambda pair: pair[0][0])


def test_the_finest_spans_of_whole_tokens():
    a = rows_of((4, 0, 3), (4, 3, 9), (4, 9, 11), (4, 11, 14), (7, 0, 5))
    b = rows_of((7, 0, 2), (7, 2, 5), (4, 0, 3), (4, 3, 6), (4, 6, 10), (4, 10, 14))
    spans = shared_spans(a, b)
    assert spans.of_a.tolist() == [0, 1, 1, 1, 2]
    assert spans.of_b.tolist() == [2, 2, 0, 1, 1, 1]
    assert (spans.documents.tolist(), spans.starts.tolist(), spans.ends.tolist()) == ([4, 4, 7], [0, 3, 0], [3, 14, 5])
    assert {x.dtype for x in spans} == {np.dtype(np.int32)}


def test_text_that_one_model_lacks_is_in_no_span():
    a = rows_of((0, 0, 4), (0, 4, 8), (0, 8, 12), (0, 12, 16), (1, 0, 3))
    b = rows_of((0, 2, 4), (0, 4, 6), (0, 6, 8), (0, 8, 10), (0, 12, 16), (2, 0, 3))
    spans = shared_spans(a, b)
    assert spans.of_a.tolist() == [-1, 0, -1, 1, -1]
    assert spans.of_b.tolist() == [-1, 0, 0, -1, 1, -1]


def test_text_missing_in_both_at_the_same_place_is_not_in_a_span():
    a, b = rows_of((0, 0, 3), (0, 3, 6), (0, 20, 25)), rows_of((0, 0, 6), (0, 20, 22), (0, 22, 25))
    assert found_spans(shared_spans(a, b)) == [((0, 1), (0,)), ((2,), (1, 2))]


def test_a_span_may_go_over_the_end_of_a_sequence_whatever_the_order_of_sequences():
    a = rows_of((0, 4, 7), (0, 7, 9), (0, 0, 2), (0, 2, 4))
    b = rows_of((0, 0, 2), (0, 2, 9))
    assert found_spans(shared_spans(a, b)) == [((0, 1, 3), (1,)), ((2,), (0,))]


def test_a_character_is_put_together_from_sequences_in_any_order():
    """Parts 2 and 3 of the character at 3 are rows before part 1 is."""
    a = rows_of((0, 3, 4), (0, 3, 4), (0, 4, 6), (0, 0, 3), (0, 3, 4))
    in_order = a[np.array([3, 4, 0, 1, 2])]
    assert found_spans(shared_spans(a, in_order)) == [
        ((0,), (2,)),
        ((1,), (3,)),
        ((2,), (4,)),
        ((3,), (0,)),
        ((4,), (1,)),
    ]


def test_parts_of_a_character():
    """b has the first and last character in as many tokens as a, the one in the middle in fewer."""
    a = rows_of((0, 0, 1), (0, 0, 1), (0, 1, 2), (0, 1, 2), (0, 1, 2), (0, 2, 3), (0, 2, 4))
    b = rows_of((0, 0, 1), (0, 0, 1), (0, 1, 2), (0, 1, 2), (0, 2, 3), (0, 2, 4))
    spans = shared_spans(a, b)
    assert spans.of_a.tolist() == [0, 1, 2, 2, 2, 3, 4]
    assert spans.of_b.tolist() == [0, 1, 2, 2, 3, 4]
    assert spans.starts.tolist() == [0, 0, 1, 2, 2]
    assert spans.ends.tolist() == [1, 1, 2, 3, 4]


@pytest.mark.parametrize("kept", [[0, 1, 2], [2, 3, 4]])
def test_a_character_that_breaks_off_in_one_model_is_in_no_span(kept):
    """The character from 2 to 3 has three tokens, two of which are kept."""
    a = rows_of((0, 0, 2), (0, 2, 3), (0, 2, 3), (0, 2, 3), (0, 3, 5))
    kept = np.array(kept)
    spans = shared_spans(a, a[kept])
    whole = int(kept[0] and 4)
    assert found_spans(spans) == [((whole,), (int(np.flatnonzero(kept == whole)[0]),))]


def test_a_token_owns_a_gap_of_one_character_before_it():
    spaced = rows_of((0, 0, 3), (0, 4, 7), (0, 8, 9), (0, 9, 12))
    plain = rows_of((0, 0, 3), (0, 3, 7), (0, 7, 12))
    spans = shared_spans(spaced, plain)
    assert spans.of_a.tolist() == [0, 1, 2, 2]
    assert spans.of_b.tolist() == [0, 1, 2]
    assert spans.starts.tolist() == [0, 3, 7]


def test_own_gaps_of_whole_documents():
    documents = np.array([0, 0, 0, 1, 1])
    starts, ends = np.array([2, 9, 9, 0, 3]), np.array([5, 9, 12, 4, 4])
    assert own_gaps(documents, starts, ends).tolist() == [0, 5, 9, 0, 3]
    assert own_gaps(*(np.zeros(0, np.int32),) * 3).tolist() == []


@pytest.mark.parametrize("seed", range(20))
def test_equal_rows_are_their_own_spans_in_the_order_of_the_rows(seed):
    rng = np.random.default_rng(seed)
    rows = random_cut(random_widths(rng, 5, 20), 2, rng).rows
    rows = rows[sampled(len(rows.starts), int(rng.integers(1, 9)), rng.uniform(0.3, 1), rng)]
    spans = shared_spans(rows, rows)
    assert np.array_equal(spans.of_a, np.arange(len(rows.starts)))
    assert np.array_equal(spans.of_a, spans.of_b)
    assert np.array_equal(spans.documents, rows.documents)
    assert np.array_equal(spans.ends, rows.ends)


@pytest.mark.parametrize("seed", range(60))
def test_equal_tokenizers_pair_only_the_same_tokens_where_one_lacks_text(seed):
    rng = np.random.default_rng(seed)
    rows = random_cut(random_widths(rng, 3, 25), 1.5, rng).rows
    kept = sampled(len(rows.starts), 16, 0.6, rng)
    spans = shared_spans(rows, rows[kept])
    last = [rows.ends[rows.documents == document].max() for document in range(3)]
    for s, (x, y) in enumerate(found_spans(spans)):
        if spans.starts[s] > 0 and spans.ends[s] < last[spans.documents[s]]:  # else both may break off there
            assert x == (kept[y[0]],)
            assert len(y) == 1
    # At each break of a sequence no more than one character is lost, of at most four tokens.
    assert (spans.of_b < 0).sum() <= 2 * 4 * -(-len(kept) // 16)


def test_a_lone_part_at_a_break_passes_for_the_whole_character():
    whole, part = rows_of((0, 0, 2), (0, 2, 3), (0, 3, 5)), rows_of((0, 0, 2), (0, 2, 3))
    assert shared_spans(whole, part).of_b.tolist() == [0, 1]


def test_a_gap_of_more_characters_is_missing_text():
    a, b = rows_of((0, 0, 3), (0, 5, 8)), rows_of((0, 0, 3), (0, 3, 8))
    assert shared_spans(a, b).of_a.tolist() == [0, -1]


def test_tokens_without_width_are_their_own_spans_too():
    rows = rows_of((0, 3, 3), (0, 3, 3), (0, 3, 5), (0, 5, 5), (1, 0, 0), (1, 0, 2), (1, 40, 40))
    assert shared_spans(rows, rows).of_b.tolist() == [*range(7)]
    other = rows_of((0, 3, 5), (1, 0, 2))
    assert found_spans(shared_spans(rows, other)) == [((2, 3), (0,)), ((5,), (1,))]


@pytest.mark.parametrize("seed", range(200))
def test_spans_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    widths = random_widths(rng, longest=25, most_bytes=int(rng.integers(1, 5)))
    sides, orders = [], []
    for mean_bytes in (rng.uniform(1, 4), rng.uniform(1, 4)):
        rows = random_cut(widths, mean_bytes, rng).rows
        # In sequences of so many tokens, text that is missing between two is wider than a gap that a token owns.
        chosen = sampled(len(rows.starts), 16, rng.choice([0.5, 1.0]), rng)
        sides.append(rows[chosen])
        orders.append(np.argsort(chosen))
    spans = shared_spans(*sides)
    expected = reference_spans(sides[0], orders[0], sides[1], orders[1])
    assert found_spans(spans) == in_row_order(expected)


@pytest.mark.parametrize("seed", range(40))
def test_spans_of_whole_documents_have_the_same_bytes_in_both_models(seed):
    """Spans of whole characters; and no boundary between two characters that both have is left out."""
    rng = np.random.default_rng(seed)
    widths = random_widths(rng)
    a, b = (random_cut(widths, 2.5, rng) for _ in range(2))
    spans = shared_spans(a.rows, b.rows)
    assert (spans.of_a >= 0).all()
    assert (spans.of_b >= 0).all()
    ends = [np.cumsum(width).tolist() for width in widths]
    for s, (rows_a, rows_b) in enumerate(found_spans(spans)):
        of_a, of_b = a.byte_ranges[list(rows_a)], b.byte_ranges[list(rows_b)]
        whole = {0, *ends[spans.documents[s]]}
        if {of_a.min(), of_a.max()} <= whole:
            assert (of_a.min(), of_a.max()) == (of_b.min(), of_b.max())
        assert not set(of_a[:-1, 1].tolist()) & set(of_b[:-1, 1].tolist()) & whole


def tokenized(tokenizer, texts, own=False):
    """(rows of the texts, laid end to end; the token of each row)."""
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    tokens = [(d, *pair) for d, offsets in enumerate(encoded["offset_mapping"]) for pair in offsets]
    rows = rows_of(*tokens)
    if own:
        rows = rows._replace(starts=own_gaps(*(rows.documents, rows.starts, rows.ends)))
    return rows, np.concatenate(encoded["input_ids"])


@pytest.fixture(scope="module")
def texts():
    """Mixed lines first, then documents of English words in changing order, on lines of their own now and then."""
    rng, words = np.random.default_rng(0), ENGLISH.split()
    return [*MIXED, ENGLISH, *("\n".join(" ".join(rng.permutation(words)[:40]) for _ in range(4)) for _ in range(60))]


@pytest.fixture(scope="module")
def tokenizers(texts):
    """Vocabularies with few and with many merges, of English and of everything: many characters are in parts."""
    return [train_bpe(texts[5:], 300), train_bpe(texts[5:], 600), train_bpe(texts, 700), train_bpe(MIXED * 3, 400)]


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (1, 2), (2, 3)])
def test_real_tokenizers_spans_decode_to_the_same_text(texts, tokenizers, pair):
    sides = [tokenizers[i] for i in pair]
    (a, ids_a), (b, ids_b) = (tokenized(tokenizer, texts) for tokenizer in sides)
    spans = shared_spans(a, b)
    assert (spans.of_a >= 0).all()
    assert (spans.of_b >= 0).all()
    decoded = 0
    for s, (rows_a, rows_b) in enumerate(found_spans(spans)):
        text_a, text_b = sides[0].decode(ids_a[list(rows_a)]), sides[1].decode(ids_b[list(rows_b)])
        if "�" not in text_a + text_b:  # not a part of a character
            assert text_a == text_b == texts[spans.documents[s]][spans.starts[s] : spans.ends[s]]
            decoded += 1
    assert decoded > 0.9 * spans.n_spans > 0.1 * len(ids_a)


def test_real_tokenizers_on_parts_of_the_text(texts, tokenizers):
    rng = np.random.default_rng(0)
    (a, ids_a), (b, ids_b) = (tokenized(tokenizer, texts) for tokenizer in tokenizers[1:3])
    everywhere = shared_spans(a, b)
    kept_a, kept_b = sampled(len(ids_a), 64, 0.7, rng), sampled(len(ids_b), 48, 0.6, rng)
    spans = shared_spans(a[kept_a], b[kept_b])
    assert 0 < spans.n_spans < everywhere.n_spans
    assert (np.diff([np.flatnonzero(spans.of_a == s)[0] for s in range(spans.n_spans)]) > 0).all()
    full = {(x, y) for x, y in found_spans(everywhere)}
    found = {
        (tuple(sorted(kept_a[list(x)].tolist())), tuple(sorted(kept_b[list(y)].tolist())))
        for x, y in found_spans(spans)
    }
    assert found <= full
    missing = full - found
    held_a, held_b = set(kept_a.tolist()), set(kept_b.tolist())
    assert not [pair for pair in missing if set(pair[0]) <= held_a and set(pair[1]) <= held_b]


@pytest.mark.parametrize("own", [True, False])
def test_trimmed_offsets_give_the_same_spans(texts, tokenizers, own):
    """Lines of single-spaced text; with `own_gaps` any text but tokens that end in spaces."""
    lines = [" ".join(text.split()) for text in texts] if not own else [t.replace("\n", " ") for t in texts]
    first, second = tokenizers[:2]
    (a, _), (b, _) = (tokenized(tokenizer, lines) for tokenizer in (first, second))
    backend = second.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
    try:
        trimmed, _ = tokenized(second, lines, own)
    finally:
        backend.post_processor = None
    assert own or not np.array_equal(trimmed.starts, b.starts)
    for found, expected in zip(shared_spans(a, trimmed), shared_spans(a, b), strict=True):
        assert np.array_equal(found, expected)


def test_rows_that_repeat_text_are_refused():
    rows, other = rows_of((0, 0, 3), (0, 3, 5), (2, 0, 3)), rows_of((0, 0, 5))
    for twice in ([0, 1, 2, 0, 1], [0, 0, 1], [0, 1, 1], [1, 2, 0, 1]):
        with pytest.raises(
            StudyError, match="the second model: rows hold the text of document 0 at character [03] twice"
        ):
            shared_spans(other, rows[np.array(twice)])
    with pytest.raises(StudyError, match="the first model: .* twice"):
        shared_spans(rows_of((0, 0, 9), (0, 2, 4)), other)
    parts = rows_of((0, 0, 1), (0, 0, 1), (0, 1, 3))
    with pytest.raises(StudyError, match="twice"):
        shared_spans(parts[np.array([0, 1, 2, 0, 1, 2])], other)


def test_offsets_of_no_text_are_refused():
    good = rows_of((0, 0, 3))
    for bad in (rows_of((-1, 0, 3)), rows_of((0, -1, 3)), rows_of((0, 3, 2))):
        with pytest.raises(StudyError, match="the first model, row 0: document .* is no text"):
            shared_spans(bad, good)
    with pytest.raises(StudyError, match="one of each a row"):
        shared_spans(good, good._replace(ends=np.array([1, 2])))


def test_no_rows_and_no_shared_text():
    nothing, something = rows_of(), rows_of((0, 0, 3))
    for a, b in ((nothing, something), (something, nothing), (nothing, nothing), (something, rows_of((1, 0, 3)))):
        spans = shared_spans(a, b)
        assert spans.n_spans == 0
        assert spans.of_a.tolist() == [-1] * len(a.starts)
        assert spans.of_b.tolist() == [-1] * len(b.starts)


def random_codes(n_tokens, n_features, rng, signed=False, dtype=np.float32):
    codes = scipy.sparse.random_array((n_tokens, n_features), density=0.3, rng=rng).tocsr().astype(dtype)
    codes.data = np.ceil(codes.data * 4).astype(dtype)  # few different values: ties
    if signed:
        codes.data *= rng.choice([-1, 1], len(codes.data)).astype(dtype)
    return codes


def largest(rows):
    """The value of largest magnitude of each column, the positive of two."""
    return np.array([max(column, key=lambda x: (abs(x), x), default=0) for column in rows.T])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("signed", [False, True])
def test_pooled_values_equal_brute_force(seed, signed):
    rng = np.random.default_rng(seed)
    n_tokens, n_spans = 40, int(rng.integers(1, 40))
    dtype = rng.choice([np.float32, np.float64])
    codes = random_codes(n_tokens, 15, rng, signed, dtype)
    span = rng.integers(-1, n_spans, n_tokens).astype(np.int32)
    dense = codes.toarray()
    expected = np.array([largest(dense[span == s]) if (span == s).any() else np.zeros(15) for s in range(n_spans)])
    pooled = pool(codes, span, n_spans)
    assert pooled.shape == (n_spans, 15)
    assert pooled.dtype == dtype
    assert np.array_equal(pooled.toarray(), expected)
    assert all((np.diff(pooled.indices[i:j]) > 0).all() for i, j in itertools.pairwise(pooled.indptr))
    if not signed:
        maxima = [dense[span == s].max(axis=0, initial=0) for s in range(n_spans)]
        assert np.array_equal(pooled.toarray(), maxima)
    assert np.array_equal(pool_dense(dense, span, n_spans), expected)
    assert pool_dense(dense, span, n_spans).dtype == dtype


def test_with_one_token_a_span_pooling_permutes_rows_bit_for_bit():
    rng = np.random.default_rng(0)
    codes = random_codes(50, 20, rng, signed=True)
    codes.data[:3] = [0.0, -0.0, 1e-42]  # entries that are zero stay
    order = rng.permutation(50)
    pooled, expected = pool(codes, np.argsort(order), 50), codes[order]
    for found, wanted in zip(
        (pooled.data.view(np.int32), pooled.indices, pooled.indptr),
        (expected.data.view(np.int32), expected.indices, expected.indptr),
        strict=True,
    ):
        assert np.array_equal(found, wanted)
        assert found.dtype == wanted.dtype
    dense = rng.standard_normal((50, 4)).astype(np.float32)
    dense[0, 0] = -0.0
    assert pool_dense(dense, np.argsort(order), 50).tobytes() == dense[order].tobytes()


def test_codes_need_not_be_sorted_and_are_left_as_they_were():
    codes = scipy.sparse.csr_array(
        (np.array([1.0, 2, 3, 4]), np.array([3, 0, 2, 0]), np.array([0, 2, 4])), shape=(2, 4)
    )
    assert pool(codes, np.array([0, 0]), 1).toarray().tolist() == [[4, 0, 3, 1]]
    assert pool(codes, np.array([0, 1]), 2).indices.tolist() == [0, 3, 0, 2]
    assert codes.indices.tolist() == [3, 0, 2, 0]


def test_span_numbers_that_do_not_fit_are_refused():
    codes = random_codes(4, 3, np.random.default_rng(0))
    for values, pooling in ((codes, pool), (codes.toarray(), pool_dense)):
        with pytest.raises(StudyError, match=r"shape \(3,\) for the values of 4 tokens"):
            pooling(values, np.zeros(3, np.int32), 1)
        with pytest.raises(StudyError, match="numbers from 0 to 2; they must be from -1 to 1"):
            pooling(values, np.array([0, 1, 2, 0]), 2)
    assert pool(codes, np.full(4, -1), 0).shape == (0, 3)
    assert pool_dense(codes.toarray(), np.full(4, -1), 0).shape == (0, 3)


def test_a_million_rows():
    """Takes seconds; every row of b is in a span, as documents are whole."""
    rng = np.random.default_rng(0)
    bounds = [np.unique(np.append(rng.integers(0, 4_000_000, n), [0, 4_000_000])) for n in (1_100_000, 800_000)]
    a, b = (Rows(np.zeros(len(x) - 1, np.int32), x[:-1], x[1:]) for x in bounds)
    shuffled = sampled(len(a.starts), 256, 1.0, rng)
    spans = shared_spans(a[shuffled], b)
    assert spans.n_spans == len(np.intersect1d(*bounds)) - 1
    assert (spans.of_b >= 0).all()
    codes = scipy.sparse.csr_array(
        (
            rng.random(4 * len(shuffled), np.float32),
            np.tile([1, 5, 6, 9], len(shuffled)),
            np.arange(len(shuffled) + 1) * 4,
        ),
        shape=(len(shuffled), 16),
    )
    pooled = pool(codes, spans.of_a, spans.n_spans)
    assert pooled.nnz == 4 * spans.n_spans
    expected = np.zeros((spans.n_spans, 4), np.float32)
    np.maximum.at(expected, spans.of_a, codes.data.reshape(-1, 4))
    assert np.array_equal(pooled.data.reshape(-1, 4), expected)
    assert np.array_equal(pool_dense(codes.data.reshape(-1, 4), spans.of_a, spans.n_spans), expected)
