"""One training step of a small Mamba: ours against transformers' own CPU path, in turn, same weights and batch.

    python benchmarks/mamba_training_step.py --layers 8 --width 256 --batch 32 --length 256 --threads 2 --rounds 1

Forward, backward and AdamW. transformers keeps the decays and states of every position for the backward pass; at that
size a step of it takes minutes. Prints a table of medians and, last, ratio=<median of theirs over ours>.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from side_by_side import in_turn, ratio, table, use_threads
from transformers import MambaConfig, MambaForCausalLM

from universality.models.language_model import LanguageModel


def stepping(logits_of, parameters, tokens):
    """A training step that goes on from the last one."""
    optimiser = torch.optim.AdamW(parameters, fused=True)

    def step() -> None:
        logits = logits_of(tokens)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 8), ("width", 256), ("batch", 32), ("length", 256), ("threads", 2), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    use_threads(options.threads)
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=1024, hidden_size=options.width, num_hidden_layers=options.layers, state_size=16, use_cache=False
    )
    theirs = MambaForCausalLM(config).train()
    ours = LanguageModel(copy.deepcopy(theirs))
    tokens = torch.randint(0, 1024, (options.batch, options.length))
    sides = {
        "ours": (lambda x: ours.run(x).logits, list(ours.hf.parameters())),
        "transformers": (lambda x: theirs(x).logits, list(theirs.parameters())),
    }
    for logits_of, parameters in sides.values():
        stepping(logits_of, parameters, tokens[:2, :8])()  # compiles and allocates
    ways = {name: stepping(logits_of, parameters, tokens) for name, (logits_of, parameters) in sides.items()}
    times = in_turn(ways, options.rounds, warm=True)
    table(times, tokens.numel(), "tokens")
    print(f"ratio={ratio(times, 'ours', 'transformers'):.2f}")


if __name__ == "__main__":
    main()
