"""transformer-lens' HookedTransformer, patching paths of heads to the logits: reads commands line by line.

Runs in the environment of tests/interop/sae_lens (.venv-sae-lens). The first line is JSON: a folder with a GPT-NeoX in
transformers' format and task.safetensors with tokens `clean` and `corrupted` [S, L], `answer` and `distractor` [S].
Then "cache" runs both and keeps every z; "direct 3 7" and "total 3 7" patch head 7 of layer 3 in a run of the whole
model and answer with the change of the logit difference of each sequence, as JSON.
"""

import contextlib
import json
import sys

import torch
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_neox_weights
from transformers import AutoModelForCausalLM


def load(folder: str) -> HookedTransformer:
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    c = hf.config
    d_head = c.hidden_size // c.num_attention_heads
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_heads=c.num_attention_heads, d_head=d_head,
        d_mlp=c.intermediate_size, d_vocab=c.vocab_size, n_ctx=c.max_position_embeddings, act_fn=c.hidden_act,
        eps=c.layer_norm_eps, parallel_attn_mlp=c.use_parallel_residual, normalization_type="LN",
        positional_embedding_type="rotary", rotary_adjacent_pairs=False,
        rotary_dim=int(c.rope_parameters["partial_rotary_factor"] * d_head), device="cpu",
    )  # fmt: skip
    model = HookedTransformer(config)
    model.load_state_dict(convert_neox_weights(hf, config), strict=False)  # masks are not in it
    return model.eval().requires_grad_(False)


class Patching:
    def __init__(self, folder: str):
        self.model, self.task = load(folder), load_file(f"{folder}/task.safetensors")

    def cache(self) -> None:
        def runs(tokens):
            return self.model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_z"))

        logits, self.clean = runs(self.task["clean"])
        _, self.corrupted = runs(self.task["corrupted"])
        self.before = self._difference(logits)

    def patch(self, path: str, layer: int, head: int) -> list[float]:
        sender = f"blocks.{layer}.attn.hook_z"

        def hook(z, hook):
            if path == "direct":
                z = self.clean[hook.name]
            if hook.name == sender:
                z = z.clone()
                z[:, :, head] = self.corrupted[sender][:, :, head]
            return z

        names = self.clean if path == "direct" else [sender]
        logits = self.model.run_with_hooks(self.task["clean"], fwd_hooks=[(name, hook) for name in names])
        return (self._difference(logits) - self.before).tolist()

    def _difference(self, logits):
        rows = torch.arange(len(logits))
        return logits[rows, -1, self.task["answer"]] - logits[rows, -1, self.task["distractor"]]


@torch.inference_mode()
def main() -> None:
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    with contextlib.redirect_stdout(sys.stderr):
        patching = Patching(job["folder"])
    print("ready", flush=True)
    for line in sys.stdin:
        command, *place = line.split()
        if command == "cache":
            patching.cache()
            print("done", flush=True)
        else:
            print(json.dumps(patching.patch(command, *map(int, place))), flush=True)


if __name__ == "__main__":
    main()
