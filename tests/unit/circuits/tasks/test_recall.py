import torch

from universality.circuits.tasks.recall import make_task

S, PAIRS, FILLER, V, END = 200, 4, 3, 40, 0
ROWS = torch.arange(S)


def task_of(**changes):
    return make_task(S, PAIRS, V, END, 2, filler=FILLER, **changes)


def test_the_value_that_stood_after_the_queried_key_is_the_answer():
    task = task_of()
    assert task.clean.shape == (S, 2 * PAIRS + FILLER + 2)
    key, value = task.positions["key"], task.positions["value"]
    assert torch.equal(value, key + 1)
    assert set(key.tolist()) == {1, 3, 5, 7}
    assert torch.equal(task.clean[ROWS, key], task.clean[:, -1])
    for row in task.clean:
        assert len(set(row.tolist())) == task.clean.shape[1] - 1
    last = task_of(queried=PAIRS - 1)
    assert (last.positions["key"] == 7).all()


def test_replacing_puts_in_a_token_that_is_not_there():
    task = task_of()
    changed = task.corrupted["replace_value"] != task.clean
    assert torch.equal(changed.nonzero(), torch.stack([ROWS, task.positions["value"]], dim=1))
    assert torch.equal(task.corrupted["replace_value"][ROWS, task.positions["value"]], task.distractor)
    assert not (task.clean == task.distractor[:, None]).any()


def test_swapping_moves_the_value_to_another_key():
    task = task_of(distractor="other_value")
    swapped = task.corrupted["swap_values"]
    assert ((swapped != task.clean).sum(dim=1) == 2).all()
    assert torch.equal(swapped.sort(dim=1).values, task.clean.sort(dim=1).values)
    assert torch.equal(swapped[ROWS, task.positions["value"]], task.distractor)
    where = (task.clean == task.distractor[:, None]).nonzero()[:, 1]
    assert set(where.tolist()) == {2, 4, 6, 8}
    assert (where != task.positions["value"]).all()
    assert torch.equal(swapped[ROWS, where], task.answer)


def test_the_kind_of_distractor_changes_no_prompt():
    absent, other = task_of(), task_of(distractor="other_value")
    assert torch.equal(absent.clean, other.clean)
    for name, prompts in absent.corrupted.items():
        assert torch.equal(prompts, other.corrupted[name])


def test_random_prompts_keep_the_queried_key_alone():
    task = make_task(2000, PAIRS, V, END, 2)
    random = task.corrupted["random"]
    assert not (random[:, 1:] == END).any()
    assert abs(float((random[:, 1:-1] == task.clean[:, 1:-1]).float().mean()) - 1 / 39) < 0.004
    assert abs(float((random[:, 1:-1] == random[:, -1:]).float().mean()) - 1 / 39) < 0.004
