import numpy as np
import pytest

from universality.alignment.token_order import order_by_document, rotations
from universality.errors import StudyError


@pytest.fixture
def order():
    documents = np.random.default_rng(0).integers(0, 90, 3000)
    return documents, order_by_document(documents, [0.125, 0.25], 40, seed=1)


def test_documents_stay_whole_and_in_their_own_order(order):
    documents, order = order
    assert sorted(order.rows) == list(range(3000))
    inner = documents[order.rows]
    assert (np.flatnonzero(np.diff(inner)) + 1).tolist() == order.documents[1:-1].tolist()
    for start, stop in zip(order.documents, order.documents[1:], strict=False):
        assert (np.diff(order.rows[start:stop]) > 0).all()


def test_prefixes_halves_and_groups_end_where_documents_do(order):
    _, order = order
    assert set(order.cuts) <= set(order.documents)
    assert set(order.groups) <= set(order.documents)
    assert order.cuts[order.half] in order.groups
    assert abs(order.cuts[order.half] - 1500) < 60
    assert len(order.groups) - 1 <= 40
    assert order.groups[order.first_measured_group] == order.cuts[order.half]
    assert order.segments()[-1].tolist() == [order.cuts[order.half], 3000]


def test_rotations_are_by_whole_documents(order):
    _, order = order
    drawn = rotations(order, 5, seed=2)
    assert len(set(drawn)) == 5
    assert set(drawn) <= set(order.documents[1:-1])


def test_too_few_documents_are_an_error():
    with pytest.raises(StudyError, match="of 7 documents; halves and resamples of documents need 8"):
        order_by_document(np.arange(70) // 10, [], 40, seed=1)
