"""Time per token of Mamba's forward pass as sequences grow: linear attention's promise, on a CPU.

    python benchmarks/mamba_length.py --layers 4 --threads 2 --rounds 5

Mamba-130M's widths, random weights, 16,384 tokens a run however they are cut. Prints a table and, last,
ratio=<time per token at the longest length over that at the shortest>.
"""

import argparse

import torch
from side_by_side import in_turn, ratio, table, use_threads
from transformers import MambaConfig, MambaForCausalLM

from universality.models.language_model import LanguageModel

LENGTHS = (256, 1024, 4096, 16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("threads", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    use_threads(options.threads)
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=50280, hidden_size=768, num_hidden_layers=options.layers, state_size=16, use_cache=False
    )
    model = LanguageModel(MambaForCausalLM(config).eval().requires_grad_(False))
    tokens = torch.randint(0, 50280, (LENGTHS[-1],))
    sites = [f"resid_post.{layer}" for layer in range(options.layers)]
    ways = {f"L {n}": lambda n=n: model.run(tokens.view(-1, n), capture=sites, logits=False) for n in LENGTHS}
    with torch.inference_mode():
        times = in_turn(ways, options.rounds)
    table(times, len(tokens), "tokens")
    print(f"ratio={ratio(times, f'L {LENGTHS[0]}', f'L {LENGTHS[-1]}'):.3f}")


if __name__ == "__main__":
    main()
