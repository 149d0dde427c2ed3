"""Paths of all heads to the logits, the section "heads" of path_patching.py: ours against a loop of full runs.

Pythia-160M's sizes, weights random, the induction task with B replaced. Both sides begin with tokens and end with an
effect for each head, so the clean and the corrupted run are in both times. The peer, HookedTransformer of
transformer-lens 3.9, makes one run for each head; a few --timed heads, spread over the layers, are timed and their time
is scaled to all of them, as every run is of the whole model. Effects of the timed heads are compared.
"""

import json
from pathlib import Path

import torch
from peer import Peer
from safetensors.torch import save_file
from side_by_side import in_turn, ratio, table
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from universality.circuits.columns import METRICS
from universality.circuits.head_paths import HeadPaths
from universality.circuits.tasks.base import Task
from universality.circuits.tasks.induction import make_task
from universality.models.language_model import LanguageModel

VOCABULARY, HEADS = 50_304, 12


def prepare(options, folder: Path) -> tuple[LanguageModel, Task]:
    """Ours, and what the peer reads of it."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=768, num_hidden_layers=options.layers, num_attention_heads=HEADS,
        intermediate_size=3072, max_position_embeddings=2048, use_parallel_residual=not options.sequential,
    )  # fmt: skip
    hf = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    hf.save_pretrained(folder)
    task = make_task(options.batch, options.length, VOCABULARY, end_of_text=0, seed=0)
    tensors = {"clean": task.clean, "corrupted": task.corrupted["replace_B"]}
    tensors |= {"answer": task.answer, "distractor": task.distractor.contiguous()}
    save_file(tensors, folder / "task.safetensors")
    return LanguageModel(hf), task


def heads(options, folder: Path) -> None:
    model, task = prepare(options, folder)
    peer = Peer("head_patching", {"folder": str(folder), "threads": options.threads}, options.python)
    n_heads = options.layers * HEADS
    timed = [divmod(n * n_heads // options.timed, HEADS) for n in range(options.timed)]

    found, expected = {}, {}

    def ours() -> None:
        batch = HeadPaths(model, task, "replace_B")
        found.update({(e.sender.layer, e.sender.head): e.values for e in batch.to_logits(paths=(options.path,))})

    def theirs() -> None:
        expected.update({head: json.loads(peer.ask(f"{options.path} {head[0]} {head[1]}")) for head in timed})

    ways = {"ours": ours, "clean and corrupted run": lambda: peer.ask("cache"), "transformer-lens": theirs}
    with torch.inference_mode():
        times = in_turn(ways, options.rounds)
    peer.close()
    column = METRICS.index("logit_diff")
    worst = max((found[head][:, column] - torch.tensor(expected[head])).abs().max() for head in timed)
    largest = max(torch.tensor(effect).abs().max() for effect in expected.values())
    print(f"largest difference of an effect on the logit difference: {worst:.1e}, of effects up to {largest:.1e}")
    print(f"transformer-lens: {len(timed)} of {n_heads} heads were timed; their time is scaled to all")
    before = times.pop("clean and corrupted run")
    runs = times["transformer-lens"]
    times["transformer-lens"] = [b + s * n_heads / len(timed) for b, s in zip(before, runs, strict=True)]
    table(times, n_heads, "heads")
    print(f"ratio={ratio(times, 'ours', 'transformer-lens'):.1f}")
