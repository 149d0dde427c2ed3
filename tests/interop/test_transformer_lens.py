"""Our sites against transformer-lens' hooks, on the same tiny random checkpoints.

transformer-lens' bridge runs in an environment of its own (transformer_lens/requirements.lock, made once in
.venv-transformer-lens) and writes what it sees under our names (transformer_lens/dump.py). It does attention and the
recurrences of Mamba by its own code, so it is a second opinion there; the rest it takes from transformers' modules.

`embed` is what the token embedding gives: without GPT-2's positions, before Falcon-H1's multiplier.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.interop.environment import peer_python
from universality.models.language_model import LanguageModel

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformer_lens")]  # one worker: it is started once

HERE = Path(__file__).parent / "transformer_lens"
VOCABULARY, LENGTH = 50, 12

MAMBA = "mamba.L.conv_in mamba.L.ssm_in mamba.L.delta mamba.L.B mamba.L.C mamba.L.state mamba.L.y mamba.L.gate"
ATTENTION = "attn.L.q attn.L.k attn.L.v attn.L.pattern attn.L.z"

# Every site that is compared, in every layer L: all that transformer-lens has with our meaning.
SITES = {
    "gpt_neox": f"embed resid_pre.L resid_post.L {ATTENTION} mlp.L.post",
    "gpt2": f"embed resid_pre.L resid_mid.L resid_post.L {ATTENTION} mlp.L.post",
    "llama": f"embed resid_pre.L resid_mid.L resid_post.L {ATTENTION} mlp.L.post",
    "falcon_h1": f"embed resid_pre.L resid_mid.L resid_post.L {ATTENTION} mlp.L.post",
    "rwkv": "embed resid_pre.L resid_mid.L resid_post.L mlp.L.post",
    "mamba": f"embed resid_pre.L resid_post.L {MAMBA}",
    "mamba2": f"embed resid_pre.L resid_post.L {MAMBA}",
}
POSITIONS = (0, 5, -1)  # where states are compared: `state` above stands for state@P at each

# No two axes of a site are equally long (but a pattern's), keys are shared where they can be, no multiplier is 1.
CONFIGS = {
    "gpt_neox": {
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": LENGTH,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "gpt2": {"n_head": 2, "n_positions": LENGTH},
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 48},
    "falcon_h1": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 48,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 6,
        "mamba_chunk_size": 4,
        "embedding_multiplier": 1.7,
        "lm_head_multiplier": 0.3,
        "key_multiplier": 0.5,
        "attention_in_multiplier": 1.2,
        "attention_out_multiplier": 0.7,
        "mlp_multipliers": [0.8, 1.2],
        "ssm_in_multiplier": 1.5,
        "ssm_out_multiplier": 0.6,
        "ssm_multipliers": [0.5, 0.7, 0.9, 1.1, 1.3],
    },
    "rwkv": {"attention_hidden_size": 16, "context_length": LENGTH},
    "mamba": {"state_size": 6},
    "mamba2": {"state_size": 6, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
}


def random_model(family: str) -> torch.nn.Module:
    """A model of transformers' own making in which every path and every bias matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "tie_word_embeddings": False}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **common, **special, **CONFIGS[family])
    torch.manual_seed(1)
    hf = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.ndim >= 2 and "A_log" not in name:
                parameter.mul_(2)
            parameter.add_(0.1 * torch.randn_like(parameter))
    return hf.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, tuple]:
    """Family -> model, tokens, what transformer-lens sees; it is started once."""
    python, models, folders = peer_python("transformer-lens"), {}, {}
    for family in SITES:
        folders[family] = tmp_path_factory.mktemp(family)
        models[family] = random_model(family)
        models[family].save_pretrained(folders[family] / "model")
        save_file({"tokens": torch.randint(VOCABULARY, (3, LENGTH))}, folders[family] / "tokens.safetensors")
    done = subprocess.run([python, "-I", HERE / "dump.py", *folders.values()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {
        family: (
            models[family],
            load_file(folder / "tokens.safetensors")["tokens"],
            load_file(folder / "sites.safetensors"),
        )
        for family, folder in folders.items()
    }


@pytest.mark.parametrize("family", SITES)
def test_sites_have_the_values_that_transformer_lens_sees(family, seen):
    hf, tokens, lens = seen[family]
    layers = range(hf.config.num_hidden_layers)
    expected = {site.replace("L", str(layer)) for site in SITES[family].split() for layer in layers}
    assert lens.keys() == {"logits"} | expected  # all that was written is compared
    for site in [site for site in expected if site.endswith(".state")]:
        states = lens.pop(site)
        lens |= {f"{site}@{position}": states[:, position] for position in POSITIONS}

    logits, captured = LanguageModel(hf).run(tokens, capture=lens.keys() - {"logits"})
    ours = {"logits": logits} | captured
    for site in sorted(lens):
        torch.testing.assert_close(
            ours[site], lens[site], rtol=1e-4, atol=1e-5, msg=lambda text, site=site: f"{family} {site}: {text}"
        )
