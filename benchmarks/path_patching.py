"""Path patching at published sizes: ours against the published ways.

    python benchmarks/path_patching.py                              # states of all 24 layers -> logits, Mamba-130M
    python benchmarks/path_patching.py --timed 2                    # the peer patches two layers, its time scaled up
    python benchmarks/path_patching.py --growth                     # ours alone, by layers and by length
    python benchmarks/path_patching.py --what heads [--path total]  # heads -> logits, Pythia-160M

Weights are random at the real sizes; a batch of the induction task, B replaced. States: the published loop, with
mamba-lens on a CPU, runs clean and corrupted tokens, then the whole model once for each layer. Any way to these effects
needs a clean and a corrupted pass; ours is set against two of the model as well, by torch's products, where its own are
oneDNN's. Heads: path_patching_heads.py. Prints
medians, by how much the effects of the two differ and, last, ratio=<median of theirs over ours>.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from path_patching_heads import heads
from peer import ENVIRONMENT, Peer
from safetensors.torch import save_file
from side_by_side import in_turn, ratio, table, use_threads
from transformers import MambaConfig, MambaForCausalLM

from universality.circuits.ssm_fast import SsmPatching
from universality.circuits.tasks.base import Task
from universality.circuits.tasks.induction import make_task
from universality.models.language_model import LanguageModel

VOCABULARY = 50_280


def mamba(n_layers: int, width: int = 768) -> LanguageModel:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=n_layers, state_size=16, use_cache=False,
        initializer_range=0.02,  # with the default, 0.1, random models amplify rounding a thousandfold
    )  # fmt: skip
    return LanguageModel(MambaForCausalLM(config).eval().requires_grad_(False))


def state_effects(model: LanguageModel, task: Task) -> np.ndarray:
    """Total effects on the logit difference [layers, S]."""
    with torch.inference_mode():
        effects = SsmPatching(model, task, "replace_B").state_to_logits(["total"])
        return np.stack([effect.values[:, 0].numpy() for effect in effects])


def two_passes(model: LanguageModel, task: Task) -> None:
    with torch.inference_mode():
        for tokens in (task.clean, task.corrupted["replace_B"]):
            model.run(tokens, logits=False)


def state(options, folder: Path) -> None:
    """The state of every layer -> logits."""
    model = mamba(options.layers)
    task = make_task(options.batch, options.length, VOCABULARY, end_of_text=0, seed=0)
    tensors = {name: value for name, value in model.hf.state_dict().items() if name != "lm_head.weight"}  # tied
    tensors |= {"clean": task.clean, "corrupted": task.corrupted["replace_B"]}
    tensors |= {"answer": task.answer, "distractor": task.distractor}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "tensors.safetensors")
    job = {
        "width": model.d_model, "layers": options.layers, "vocabulary": VOCABULARY,
        "rank": model.hf.config.time_step_rank, "threads": options.threads,
        "tensors": str(folder / "tensors.safetensors"),
    }  # fmt: skip
    peer = Peer("path_patching", job, options.python)
    found: dict[str, np.ndarray] = {}
    layers = np.linspace(0, options.layers - 1, min(options.timed, options.layers)).round().astype(int)

    def prepare() -> None:
        found["clean"] = np.array(json.loads(peer.ask("prepare")))

    def patch() -> None:
        found["patched"] = np.stack([json.loads(peer.ask(f"patch {layer}")) for layer in layers])

    def ours() -> None:
        found["ours"] = state_effects(model, task)

    ways = {"two passes": lambda: two_passes(model, task), "ours": ours, "prepare": prepare, "patch": patch}
    in_turn({name: ways[name] for name in ("two passes", "ours")}, 0)  # compilation
    times = in_turn(ways, options.rounds, warm=True)
    peer.close()
    scale = options.layers / len(layers)
    if scale != 1:
        print(
            f"mamba-lens: {len(layers)} layers of {options.layers} were patched; their time is multiplied by {scale:g}"
        )
    theirs = [a + scale * b for a, b in zip(times.pop("prepare"), times.pop("patch"), strict=True)]
    times["mamba-lens"] = theirs
    table(times, options.layers, "layers")
    effects = found["patched"] - found["clean"]
    worst = np.abs(found["ours"][layers] - effects).max()
    print(f"effects differ by at most {worst:.1e}; the largest is {np.abs(effects).max():.1e}")
    print(f"ours takes {1 / ratio(times, 'ours', 'two passes'):.2f} times two passes")
    print(f"ratio={ratio(times, 'ours', 'mamba-lens'):.1f}")


def state_growth(options) -> None:
    """Seconds by layers and by length, and over those of two passes."""
    for n_layers, length in ((6, 64), (12, 64), (24, 64), (24, 32), (24, 128)):
        model = mamba(n_layers)
        task = make_task(options.batch, length, VOCABULARY, end_of_text=0, seed=0)
        ways = {
            "ours": lambda model=model, task=task: state_effects(model, task),
            "two passes": lambda model=model, task=task: two_passes(model, task),
        }
        times = in_turn(ways, options.rounds)
        over = 1 / ratio(times, "ours", "two passes")
        seconds = statistics.median(times["ours"])
        print(f"layers {n_layers:3d}  length {length:4d}  {seconds:7.2f} s  {over:5.2f} times two passes")


SECTIONS = {
    "state": (state, {"layers": 24, "batch": 16, "timed": 24}),
    "heads": (heads, {"layers": 12, "batch": 8, "timed": 6}),
}
"""What is patched -> (against its peer, sizes)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=list(SECTIONS), default="state")
    for name in ("layers", "batch"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--timed", type=int, help="layers, or heads, that the peer patches")
    for name, default in (("length", 64), ("threads", 2), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--path", choices=["direct", "total"], default="direct", help="of heads")
    parser.add_argument("--sequential", action="store_true", help="of heads: MLPs after attention, not beside it")
    parser.add_argument("--python", type=Path, default=ENVIRONMENT / "bin" / "python", help="the peers' interpreter")
    parser.add_argument("--growth", action="store_true", help="of states")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    versus, sizes = SECTIONS[given["what"]]
    options = argparse.Namespace(**sizes | given)
    use_threads(options.threads)
    if options.growth:
        state_growth(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        versus(options, Path(folder))


if __name__ == "__main__":
    main()
