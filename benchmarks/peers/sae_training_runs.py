"""sae-lens' own trainer on given rows in a given order: a folder for each seed, in its format for inference.

Runs in the environment of tests/interop/sae_lens (.venv-sae-lens). The first line is JSON: sizes, schedule, a
safetensors file with `rows` [steps * batch, d]; each further line a seed, answered when its folder is written.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file


def train(job: dict, rows: torch.Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=rows.shape[1], d_sae=job["d_sae"], k=job["k"]))
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=len(rows), train_batch_size_samples=job["batch"], lr=job["learning_rate"],
            lr_end=0.0,
            lr_warm_up_steps=job["warmup_steps"], lr_decay_steps=job["decay_steps"], device="cpu", autocast=False,
            dead_feature_window=job["dead_steps"], logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae, data_provider=iter(rows.split(job["batch"])),
    )  # fmt: skip
    trainer.fit()
    sae.save_inference_model(str(Path(job["out"]) / f"seed_{seed}"))


def main() -> None:
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    rows = load_file(job["rows"])["rows"]
    print("ready", flush=True)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            train(job, rows, int(line))
        print("done", flush=True)


if __name__ == "__main__":
    main()
