"""The published loop of path patching with mamba-lens, driven from a benchmark: a command a line, answered with a line.

Runs in the environment of tests/interop/sae_lens (.venv-sae-lens). The first line is JSON: sizes, and a safetensors
file with the model's weights as transformers names them, tokens `clean` and `corrupted` [S, L], `answer` and
`distractor` [S]. "prepare" runs both and keeps the state of every layer after the last position; "patch N" runs the
clean tokens with layer N's state from the corrupted run. Both answer with logit differences at the last position, a
JSON list.
"""

import contextlib
import json
import sys
from functools import partial

import torch
from mamba_lens import HookedMamba
from mamba_lens.HookedMamba import MambaCfg, convert_original_state_dict_to_hooked_state_dict
from safetensors.torch import load_file

PLAIN = {"fast_conv": False, "fast_ssm": False}  # the others need a GPU


def load(job, tensors):
    cfg = MambaCfg(
        d_model=job["width"], n_layers=job["layers"], vocab_size=job["vocabulary"], dt_rank=job["rank"], device="cpu"
    )
    weights = {name: value for name, value in tensors.items() if name.startswith(("backbone.", "lm_head."))}
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    model = HookedMamba(cfg=cfg, tokenizer=None, initialize_params=False)
    model.load_state_dict(convert_original_state_dict_to_hooked_state_dict(cfg, weights))
    return model.eval().requires_grad_(False)


def difference(logits, tensors):
    rows = torch.arange(len(logits))
    last = logits[:, -1]
    return (last[rows, tensors["answer"]] - last[rows, tensors["distractor"]]).tolist()


def replaced(value, hook, state):
    return state


def main() -> None:
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    with contextlib.redirect_stdout(sys.stderr):
        tensors = load_file(job["tensors"])
        model = load(job, tensors)
    print("ready", flush=True)
    last = tensors["clean"].shape[1] - 1
    sites = [f"blocks.{layer}.hook_h.{last}" for layer in range(job["layers"])]
    states = {}
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
            command, *layer = line.split()
            if command == "prepare":
                keep = {"names_filter": sites} | PLAIN
                _, states = model.run_with_cache(tensors["corrupted"], **keep)
                logits, _ = model.run_with_cache(tensors["clean"], **keep)
            else:
                site = sites[int(layer[0])]
                hooks = [(site, partial(replaced, state=states[site]))]
                logits = model.run_with_hooks(tensors["clean"], fwd_hooks=hooks, **PLAIN)
            answer = difference(logits, tensors)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
