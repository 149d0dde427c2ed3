"""What capturing the residual stream of all layers costs over a plain forward pass of transformers: Pythia-160M sizes.

    python benchmarks/capture_cost.py --batch 4 --length 256 --threads 2 --rounds 15

Weights are random at the real sizes; both sides compute logits. Prints a table of medians and, last,
ratio=<median of ours, capturing, over transformers' plain forward>.
"""

import argparse
import copy

import torch
from side_by_side import in_turn, ratio, table, use_threads
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from universality.models.language_model import LanguageModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("batch", 4), ("length", 256), ("threads", 2), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    use_threads(options.threads)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=768, num_hidden_layers=options.layers, num_attention_heads=12,
        intermediate_size=3072, max_position_embeddings=2048,
    )  # fmt: skip
    theirs = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    ours = LanguageModel(copy.deepcopy(theirs))
    tokens = torch.randint(0, 50304, (options.batch, options.length))
    sites = [f"resid_post.{layer}" for layer in range(options.layers)]
    ways = {
        "ours, capturing": lambda: ours.run(tokens, capture=sites),
        "transformers, plain": lambda: theirs(tokens, use_cache=False),
    }
    with torch.inference_mode():
        times = in_turn(ways, options.rounds)
    table(times, tokens.numel(), "tokens")
    print(f"ratio={ratio(times, 'transformers, plain', 'ours, capturing'):.3f}")


if __name__ == "__main__":
    main()
