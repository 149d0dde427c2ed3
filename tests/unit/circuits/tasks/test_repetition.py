"""Induction, on random tokens and in text."""

import numpy as np
import pytest
import torch

from universality.circuits.tasks import induction, natural
from universality.errors import StudyError

S, L, V, END = 60, 16, 200, 7
ROWS = torch.arange(S)


def text(n=90, length=20, vocab_size=40):
    """Sequences of tokens 8 to vocab_size - 1 that go up by one, each from one further on."""
    sequences = (np.arange(n)[:, None] + np.arange(length)) % (vocab_size - 8) + 8
    sequences[:, 0] = END
    return sequences.astype(np.int32)


def both(**where):
    yield induction.make_task(S, L, V, END, 5, **where)
    yield natural.make_task(S, L, text(), V, END, 5, **where)


def places_that_change(task, corruption):
    return [set(row.nonzero()[:, 0].tolist()) for row in task.corrupted[corruption] != task.clean]


def test_corruptions_change_what_they_say_and_nothing_else():
    for task in both():
        A, B = task.positions["A"], task.positions["B"]
        last = task.clean[:, -1]
        assert torch.equal(B, A + 1)
        assert torch.equal(task.clean[ROWS, A], last)
        assert places_that_change(task, "replace_B") == [{b} for b in B.tolist()]
        assert places_that_change(task, "replace_A") == [{a} for a in A.tolist()]
        assert places_that_change(task, "no_repeat") == [{a, a + 1} for a in A.tolist()]
        assert torch.equal(task.corrupted["replace_B"][ROWS, B], task.distractor)
        assert torch.equal(task.corrupted["replace_A"][ROWS, A], task.corrupted["no_repeat"][ROWS, A])
        for row in range(S):
            clean, no_repeat = task.clean[row].tolist(), task.corrupted["no_repeat"][row].tolist()
            planted = {no_repeat[A[row]], no_repeat[B[row]], int(last[row]), int(task.distractor[row])}
            assert len(planted) == 4
            assert planted & set(clean) == {int(last[row])}
            assert clean.count(int(last[row])) == 2
            assert no_repeat.count(int(last[row])) == 1
            assert int(task.answer[row]) not in no_repeat


def test_tokens_of_the_random_task_are_distinct_and_its_random_prompts_independent():
    task = induction.make_task(2000, L, 50, END, 5)
    for row in task.corrupted["no_repeat"]:
        assert len(set(row.tolist())) == L
    random = task.corrupted["random"][:, 1:-1]
    assert not (random == END).any()
    # 14 places and 49 tokens: equal to the clean one, or to the place before, 1 in 49 times
    assert (random == task.clean[:, 1:-1]).float().mean() == pytest.approx(1 / 49, rel=0.1)
    assert (random[:, 1:] == random[:, :-1]).float().mean() == pytest.approx(1 / 49, rel=0.1)
    assert random.unique().numel() == 49


def test_the_first_A_is_in_the_first_half_or_where_it_is_asked_for():
    for task in both():
        assert set(task.positions["A"].tolist()) == set(range(1, L // 2))
    for task in both(position=L - 3):
        assert (task.positions["A"] == L - 3).all()
        assert torch.equal(task.clean[:, L - 3], task.clean[:, -1])
    for distance in (1, L - 3):
        for task in both(distance=distance):
            assert (L - 1 - task.positions["B"] == distance).all()


def test_text_stands_around_the_pair_as_it_does_in_the_sequence():
    sequences = text()
    task = natural.make_task(S, L, sequences, V, END, 5)
    windows = {tuple(w) for row in sequences for w in np.lib.stride_tricks.sliding_window_view(row[1:], L - 1)}
    for row in range(S):
        A = int(task.positions["A"][row])
        kept = [p for p in range(1, L - 1) if p not in (A, A + 1)]
        for prompts, places in ((task.clean, kept), (task.corrupted["random"], range(1, L - 1))):
            prompt = prompts[row].tolist()
            assert any(all(w[p - 1] == prompt[p] for p in places) for w in windows)
        planted = {int(t[row]) for t in (task.answer, task.distractor, task.clean[:, -1])}
        assert not planted & set(task.corrupted["random"][row, :-1].tolist())


def test_windows_are_of_different_sequences_while_there_are_enough():
    sequences = np.repeat(np.arange(8, 88)[:, None], 20, axis=1)
    tasks = [natural.make_task(n, L, sequences, V, END, 5) for n in (80, 300)]
    clean, random = (t.unique(dim=0) for t in (tasks[0].clean[:, -2], tasks[1].clean[:, -2]))
    assert len(clean) == 80
    assert len(random) > 60
    for task in tasks:  # the random prompt's text is never the clean one's
        assert (task.clean[:, -2] != task.corrupted["random"][:, -2]).all()


def test_text_without_an_alternative_is_an_error():
    with pytest.raises(
        StudyError, match="natural_induction: needs at least 2 sequences of held-out tokens, there are 1"
    ):
        natural.make_task(4, L, text(1), V, END, 0)
    with pytest.raises(StudyError, match="needs 5 tokens .* length=33 leave 2 of the vocabulary's 34"):
        natural.make_task(4, 33, text(length=40) - 5, 35, END - 5, 0)
