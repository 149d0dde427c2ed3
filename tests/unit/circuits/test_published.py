"""Published values stand beside the very rows that they are of."""

import pandas as pd
import pytest

from universality.circuits.published import write_published
from universality.circuits.settings import Published
from universality.errors import StudyError
from universality.storage import write_table

MEAN = {"path": "total", "sender": "L1 y", "position": None}


def entry(**changes) -> Published:
    values = {"what": "y of layer 1", "task": "induction", "model": "mamba", "table": "paths", "where": MEAN}
    return Published(**values | {"values": {"logit": -2.0, "prob": -0.1}} | changes)


@pytest.fixture
def circuit(tmp_path):
    """Rows of one sender: the total path from everywhere and from one place, and the direct one."""
    folder = tmp_path / "induction" / "mamba"
    folder.mkdir(parents=True)
    columns = {"sender": ["L1 y"] * 3, "path": ["total", "total", "direct"], "position": [None, "B", None]}
    for metric, values in (("logit", [-1.5, -9.0, -8.0]), ("prob", [-0.2, -0.9, -0.8])):
        columns |= {
            metric: values,
            f"{metric}_low": [v - 0.1 for v in values],
            f"{metric}_high": [v + 0.1 for v in values],
        }
    write_table(folder / "paths.parquet", columns | {"accuracy": [0.75] * 3, "passes": [True] * 3})
    return folder


def written(published, folder, tmp_path) -> pd.DataFrame:
    write_published(published, [folder], tmp_path / "published.parquet")
    return pd.read_parquet(tmp_path / "published.parquet")


def test_each_value_has_its_row_and_the_table_is_printed(circuit, tmp_path, capsys):
    table = written([entry()], circuit, tmp_path)
    assert list(table.column) == ["logit", "prob"]
    assert list(table.published) == [-2.0, -0.1]
    assert list(table.measured) == [-1.5, -0.2]
    assert list(table.low) == pytest.approx([-1.6, -0.3])
    assert set(table.accuracy) == {0.75}
    printed = capsys.readouterr().out
    assert "y of layer 1" in printed
    assert "-1.5" in printed


def test_what_is_not_measured_here_is_missing(circuit, tmp_path, capsys):
    [row] = written([entry(where=MEAN | {"sender": "L9 y"}, values={"logit": 1.0})], circuit, tmp_path).to_dict(
        "records"
    )
    assert row["published"] == 1.0
    assert pd.isna(row["measured"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"where": {"sender": "L1 y"}}, r"published\[0\].where: means 3 rows of paths.parquet; it must mean one"),
        ({"model": "neox"}, "no circuit of neox on induction is given"),
    ],
)
def test_an_entry_that_means_no_row_or_several_is_refused(circuit, tmp_path, changes, message):
    with pytest.raises(StudyError, match=message):
        written([entry(**changes)], circuit, tmp_path)
