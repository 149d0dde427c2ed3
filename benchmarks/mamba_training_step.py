"""One training step of a small Mamba: ours against transformers' own CPU path, in turn, same weights and batch.

    python benchmarks/mamba_training_step.py --layers 4 --width 128 --batch 32 --length 64 --threads 2 --rounds 7

Forward, backward and AdamW. Prints a table of medians and, last, ratio=<median of theirs over ours>.
"""

import argparse
import copy
import statistics
import time

import numba
import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM

from universality.models.language_model import LanguageModel


def step_time(logits_of, optimiser, tokens) -> float:
    start = time.perf_counter()
    logits = logits_of(tokens)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimiser.step()
    optimiser.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("width", 128), ("batch", 32), ("length", 64), ("threads", 2), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=1024, hidden_size=options.width, num_hidden_layers=options.layers, state_size=16, use_cache=False
    )
    theirs = MambaForCausalLM(config).train()
    ours = LanguageModel(copy.deepcopy(theirs))
    tokens = torch.randint(0, 1024, (options.batch, options.length))
    sides = {
        "ours": (lambda x: ours.run(x).logits, torch.optim.AdamW(ours.hf.parameters(), fused=True)),
        "transformers": (lambda x: theirs(x).logits, torch.optim.AdamW(theirs.parameters(), fused=True)),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(options.rounds + 1):
        for name, (logits_of, optimiser) in sides.items():
            seconds = step_time(logits_of, optimiser, tokens)
            if round_:  # the first warms up: compilation, allocation
                times[name].append(seconds)
    per_step = options.batch * options.length
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:14s} {1e3 * median:9.1f} ms/step {per_step / median:10.0f} tokens/s")
    ratios = [b / a for a, b in zip(times["ours"], times["transformers"], strict=True)]
    print(f"ratio={statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
