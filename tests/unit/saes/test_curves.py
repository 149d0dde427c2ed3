import sys

import pytest

from universality.errors import StudyError
from universality.saes.curves import Curves, TensorBoard

POINT = {"loss": 2.5, "L0": 16.0, "explained_variance": 0.75, "dead": 0.125}


def test_the_last_point_is_told_in_a_line():
    curves = Curves()
    assert curves.last() == ""
    curves.add(step=1, **POINT)
    assert curves.last() == "loss 2.5, L0 16.0, explained 0.750, dead 0.125"


def test_tensorboard_gets_every_point_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = Curves()
    board = TensorBoard(tmp_path, ["saes/one"])
    board.add([curves])
    for step in (1, 11, 21):
        curves.add(step=step, **POINT | {"loss": 100.0 / step})
        board.add([curves])
        board.add([curves])
    board.close()
    events = EventAccumulator(str(tmp_path / "saes" / "one")).Reload()
    assert set(events.Tags()["scalars"]) == POINT.keys()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (step, pytest.approx(100 / step)) for step in (1, 11, 21)
    ]


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(StudyError, match=r"--tensorboard: needs the package tensorboard; pip install"):
        TensorBoard(tmp_path, ["one"])
    TensorBoard(None, ["one"]).close()
