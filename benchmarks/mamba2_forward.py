"""Forward pass of Mamba-2-130M: ours against transformers' CPU path, in turn, same weights and tokens.

    python benchmarks/mamba2_forward.py --batch 4 --length 256 --threads 2 --rounds 5

Weights are random at the real sizes; both sides stop below the unembedding with the residual stream of all layers.
Prints a table of medians and, last, ratio=<median of theirs over ours>.
"""

import argparse
import copy

import torch
from side_by_side import in_turn, ratio, table, use_threads
from transformers import Mamba2Config, Mamba2ForCausalLM

from universality.models.language_model import LanguageModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 24), ("batch", 4), ("length", 256), ("threads", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    use_threads(options.threads)
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=50288, hidden_size=768, num_hidden_layers=options.layers, num_heads=24, head_dim=64, state_size=128,
        expand=2, n_groups=1, use_cache=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    theirs = Mamba2ForCausalLM(config).eval().requires_grad_(False)
    ours = LanguageModel(copy.deepcopy(theirs))
    tokens = torch.randint(0, 50288, (options.batch, options.length))
    sites = [f"resid_post.{layer}" for layer in range(options.layers)]
    ways = {
        "ours": lambda: ours.run(tokens, capture=sites, logits=False),
        "transformers": lambda: theirs.backbone(tokens, output_hidden_states=True, use_cache=False),
    }
    with torch.inference_mode():
        times = in_turn(ways, options.rounds)
    table(times, tokens.numel(), "tokens")
    print(f"ratio={ratio(times, 'ours', 'transformers'):.2f}")


if __name__ == "__main__":
    main()
