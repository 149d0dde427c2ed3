import os
import subprocess
import sys

import numpy as np
import pytest

from universality.errors import StudyError
from universality.storage import (
    check_writable,
    read_json,
    read_table,
    read_tensors,
    replacing,
    write_json,
    write_table,
    write_tensors,
)

WRITERS = {
    "numbers.json": lambda path: write_json(path, {"b": 1, "a": [2.5]}),
    "rows.parquet": lambda path: write_table(path, {"x": np.arange(2_000_000)}),
    "weights.safetensors": lambda path: write_tensors(path, {"w": np.ones(1_000_000)}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_written_files_read_back_and_equal_values_give_equal_bytes(tmp_path, name):
    for folder in ("one", "two"):
        WRITERS[name](tmp_path / folder / name)
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert os.listdir(tmp_path / "one") == [name]


def test_readers_name_a_damaged_file(tmp_path):
    readers = {"rows.parquet": read_table, "weights.safetensors": read_tensors, "numbers.json": read_json}
    for name, read in readers.items():
        path = tmp_path / name
        with pytest.raises(StudyError, match=name):
            read(path)
        WRITERS[name](path)
        path.write_bytes(path.read_bytes()[:-7])
        with pytest.raises(StudyError, match=name):
            read(path)


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "numbers.json"
    write_json(path, {"old": 1})

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("{half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_half()
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["numbers.json"]


def test_a_killed_writer_leaves_no_file_of_the_final_name(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from universality.storage import replacing
with replacing(Path(sys.argv[1]) / "out") as folder:
    folder.mkdir()
    (folder / "part").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert run.returncode == -9
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", ["rows.parquet", "weights.safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk, name):
    with pytest.raises(StudyError, match=rf"{name}: cannot be written: .*[Nn]o space left") as caught:
        WRITERS[name](small_disk / name)
    assert "\n" not in str(caught.value)
    assert os.listdir(small_disk) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StudyError, match="small/results: not a folder that can be written to: Read-only"):
        check_writable(small_disk / "results")
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="file: not a folder"):
        check_writable(tmp_path / "file")


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("half")
    with replacing(tmp_path / "out") as folder:
        folder.mkdir()
        (folder / "part").write_text("whole")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "part"]
