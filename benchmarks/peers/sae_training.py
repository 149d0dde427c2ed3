"""sae-lens and dictionary_learning, driven from a benchmark: reads commands line by line, answers each with a line.

Runs in the environment of tests/interop/sae_lens (.venv-sae-lens). The first line is JSON: which library and variant,
sizes, and a safetensors file with W_enc, W_dec, b_enc, b_dec and batches x.N. Then "step" makes one training step,
"encode" encodes batches to sparse codes.
"""

import contextlib
import json
import sys
from types import SimpleNamespace

import torch
from safetensors.torch import load_file


def sae_lens_step(job, tensors):
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sizes = {"d_in": job["d_in"], "d_sae": job["d_sae"]}
    if job["variant"] == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=job["k"], use_sparse_activations=job["sparse"]))
    else:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**sizes, l1_coefficient=job["l1_coefficient"]))
    sae.load_state_dict({name: tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")})
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=job["batch"], lr=4e-4, lr_end=4e-4, device="cpu",
            autocast=job["autocast"], lr_scheduler_name="constant", lr_warm_up_steps=0, lr_decay_steps=0,
            adam_beta1=0.9, adam_beta2=0.999, n_restart_cycles=1, n_checkpoints=0, checkpoint_path=None,
            save_final_checkpoint=False, feature_sampling_window=10**9, dead_feature_window=1000,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae, data_provider=iter(()),
    )  # fmt: skip
    return lambda x: trainer._train_step(sae=sae, sae_in=x), sae.encode


def dictionary_learning_step(job, tensors):
    from dictionary_learning.trainers import StandardTrainer, TopKTrainer

    common = {
        "steps": 10**9, "activation_dim": job["d_in"], "dict_size": job["d_sae"], "layer": 0, "lm_name": "none",
        "device": "cpu", "lr": 4e-4, "warmup_steps": 1,
    }  # fmt: skip
    if job["variant"] == "topk":
        trainer = TopKTrainer(**common, k=job["k"])
    else:
        trainer = StandardTrainer(**common, l1_penalty=job["l1_coefficient"], sparsity_warmup_steps=None)
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(tensors["W_enc"].T)
        trainer.ae.encoder.bias.copy_(tensors["b_enc"])
        trainer.ae.decoder.weight.copy_(tensors["W_dec"].T)
        (trainer.ae.b_dec if job["variant"] == "topk" else trainer.ae.bias).copy_(tensors["b_dec"])
    steps = SimpleNamespace(done=1)

    def step(x):
        steps.done += 1
        trainer.update(steps.done, x)

    return step, trainer.ae.encode


def main() -> None:
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    tensors = load_file(job["tensors"])
    batches = [tensors[name] for name in sorted(tensors) if name.startswith("x.")]
    with contextlib.redirect_stdout(sys.stderr):
        make = {"sae_lens": sae_lens_step, "dictionary_learning": dictionary_learning_step}[job["library"]]
        step, encode = make(job, tensors)
    print("ready", flush=True)
    done = 0
    for line in sys.stdin:
        command = line.strip()
        if command == "step":
            with contextlib.redirect_stdout(sys.stderr):
                step(batches[done % len(batches)])
            done += 1
            print("done", flush=True)
        elif command == "encode":
            rounded = torch.autocast("cpu", dtype=torch.bfloat16, enabled=job["autocast"])
            with torch.no_grad(), rounded:
                for number in range(job["encoded"] // job["batch"]):
                    codes = encode(batches[number % len(batches)])
                    if not codes.is_sparse:
                        codes.to_sparse()
            print("done", flush=True)


if __name__ == "__main__":
    main()
