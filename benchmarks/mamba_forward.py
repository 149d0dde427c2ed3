"""Forward pass of Mamba-130M with the residual stream of all layers captured: ours against transformers' CPU path.

    python benchmarks/mamba_forward.py --products float32 --batch 4 --length 256 --threads 2 --rounds 5

Weights are random at the real sizes. Both sides stop below the unembedding, as a cache of activations does;
transformers returns `output_hidden_states`. With --products bfloat16 transformers' whole model is bfloat16, ours rounds
its matrix products. Prints times, peak memory above the weights, how far the logits of one sequence are apart, and,
last, ratio=<median of theirs over ours>.
"""

import argparse
import copy

import torch
from side_by_side import in_turn, peak_memory, ratio, table, use_threads
from transformers import MambaConfig, MambaForCausalLM

from universality.models.language_model import LanguageModel
from universality.models.precision import use_bf16_products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", choices=["float32", "bfloat16"], default="float32")
    for name, default in (("layers", 24), ("batch", 4), ("length", 256), ("threads", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    use_threads(options.threads)
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=50280, hidden_size=768, num_hidden_layers=options.layers, state_size=16, use_cache=False,
        initializer_range=0.02,  # with the default, 0.1, random models amplify rounding a thousandfold
    )  # fmt: skip
    theirs = MambaForCausalLM(config).eval().requires_grad_(False)
    ours = LanguageModel(copy.deepcopy(theirs))
    if options.products == "bfloat16":
        use_bf16_products(ours.hf, ours.family.float32_products)
        theirs = theirs.bfloat16()
    tokens = torch.randint(0, 50280, (options.batch, options.length))
    sites = [f"resid_post.{layer}" for layer in range(options.layers)]
    ways = {
        "ours": lambda: ours.run(tokens, capture=sites, logits=False),
        "transformers": lambda: theirs.backbone(tokens, output_hidden_states=True, use_cache=False),
    }
    with torch.inference_mode():
        logits = ours.run(tokens[:1]).logits, theirs(tokens[:1], use_cache=False).logits.float()
        memory = {name: peak_memory(way) for name, way in ways.items()}
        times = in_turn(ways, options.rounds)
    table(times, tokens.numel(), "tokens")
    for name, value in memory.items():
        print(f"{name:44s} {value:10.0f} MiB peak above the weights")
    error = float((logits[0] - logits[1]).norm() / logits[1].norm())
    print(f"logits differ by {error:.1e} of their norm")
    print(f"ratio={ratio(times, 'ours', 'transformers'):.2f}")


if __name__ == "__main__":
    main()
