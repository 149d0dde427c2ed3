"""`universality saes train`, killed without warning: what is lost is no more than since the last checkpoint."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import small_training, write_store
from tests.workflow.project import environment

# A group comes before single tests: long ones at the very end would leave the other worker with nothing to do.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("killed")]

VARIANTS = [
    {"architecture": "topk", "k": 4, "k_aux": 8, "aux_coefficient": 0.03125},
    {"architecture": "gated", "l1_coefficient": 2.0, "resample_steps": 90},
]
STEPS, INTERVAL = 300, 50


def command(folder: Path, out: str, shard: Path, *more: str, **changes) -> list[str]:
    training = small_training(steps=STEPS, checkpoint_steps=INTERVAL, d_sae=256, **changes).model_dump(mode="json")
    saes = [{"variant": variant, "seed": 0} for variant in VARIANTS]
    outs = [f"--out={folder / out / str(number)}" for number in range(len(saes))]
    return [
        str(Path(sys.executable).with_name("universality")), "saes", "train", "--source", "m:resid_post.0",
        "--activations", str(shard), "--settings", json.dumps({"saes": saes, "training": training}),
        "--checkpoint", str(folder / f"{out}.pt"), "--log", str(folder / f"{out}.log"), *outs, *more,
    ]  # fmt: skip


def test_a_killed_training_goes_on_from_its_last_checkpoint(tmp_path):
    values = torch.randn(6000, 32, generator=torch.Generator().manual_seed(0))
    [shard] = write_store(tmp_path / "store", values, [6000])
    subprocess.run(command(tmp_path, "whole", shard), env=environment(), check=True, capture_output=True)

    run = subprocess.Popen(command(tmp_path, "cut", shard), env=environment(), stderr=subprocess.DEVNULL)
    while not (tmp_path / "cut.pt").exists():
        assert run.poll() is None, "ended before its first checkpoint"
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "cut").exists()

    other = command(tmp_path, "cut", shard, learning_rate=0.002)
    refused = subprocess.run(other, env=environment(), capture_output=True, text=True)
    assert refused.returncode == 1
    assert re.search(r"error: \S+cut\.pt: was made from other saes\.training\.learning_rate; remove it", refused.stderr)

    subprocess.run(command(tmp_path, "cut", shard), env=environment(), check=True, capture_output=True)
    from_step = int(re.search(r"going on from step (\d+)", (tmp_path / "cut.log").read_text()).group(1))
    assert from_step >= INTERVAL
    assert from_step % INTERVAL == 0
    for path in sorted((tmp_path / "whole").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes()
    assert not (tmp_path / "cut.pt").exists()


def test_a_checkpoint_of_another_training_can_be_passed_over_aloud(tmp_path):
    values = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    [shard] = write_store(tmp_path / "store", values, [600])
    (tmp_path / "cut.pt").write_bytes(b"half a checkpoint")
    damaged = subprocess.run(command(tmp_path, "cut", shard), env=environment(), capture_output=True, text=True)
    assert damaged.returncode == 1
    assert re.search(r"error: \S+cut\.pt: is damaged; remove it to start anew", damaged.stderr)
    restarting = command(tmp_path, "cut", shard, "--on-mismatch", "restart", "--tensorboard", str(tmp_path / "board"))
    subprocess.run(restarting, env=environment(), check=True, capture_output=True)
    assert re.search(r"cut\.pt is damaged; training starts anew", (tmp_path / "cut.log").read_text())
    assert len(list((tmp_path / "board").rglob("events.*"))) == len(VARIANTS)
