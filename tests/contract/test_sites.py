"""Sites against what transformers computes: forward hooks on its own modules, and the states of its own cache."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import LENGTH, tiny_model
from tests.contract.test_families import tokens, untouched
from universality.models.settings import STATE_SPACE_FAMILIES

LAYER = 1


def what_modules_see(plain, paths: dict[str, str], **arguments):
    """Inputs and outputs of submodules of a plain model of transformers: "name" -> (input, output)."""
    seen, handles = {}, []
    for name, path in paths.items():

        def keep(module, args, kwargs, out, name=name):
            read = args[0] if args else kwargs.get("hidden_states")
            seen[name] = (read, out if torch.is_tensor(out) else out[0])

        handles.append(plain.get_submodule(path).register_forward_hook(keep, with_kwargs=True))
    out = plain(tokens(), **arguments)
    for handle in handles:
        handle.remove()
    return seen, out


def check(model, expected: dict[str, torch.Tensor]) -> None:
    captured = model.run(tokens(), capture=expected).captured
    for site, value in expected.items():
        torch.testing.assert_close(captured[site], value, rtol=1e-4, atol=1e-5, msg=lambda m, s=site: f"{s}: {m}")


ATTENTION = {  # family: block, attention, projections, output, MLP's last product, the norm that reads resid_mid
    "gpt_neox": ("gpt_neox.layers", "attention", ("query_key_value",), "dense", "mlp.dense_4h_to_h", None),
    "gpt2": ("transformer.h", "attn", ("c_attn",), "c_proj", "mlp.c_proj", "ln_2"),
    "llama": ("model.layers", "self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj", "mlp.down_proj",
              "post_attention_layernorm"),
    "falcon_h1": ("model.layers", "self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj", "feed_forward.down_proj",
                  "pre_ff_layernorm"),
}  # fmt: skip


@pytest.mark.parametrize("family", ATTENTION)
def test_attention_and_mlp(family):
    model = tiny_model(family, n_kv_heads=1) if family in ("llama", "falcon_h1") else tiny_model(family)
    blocks, attention, projections, output, mlp, middle = ATTENTION[family]
    block = f"{blocks}.{LAYER}"
    paths = {"z": f"{block}.{attention}.{output}", "mlp": f"{block}.{mlp}"}
    paths |= {name: f"{block}.{attention}.{name}" for name in projections}
    if middle:
        paths["mid"] = f"{block}.{middle}"
    plain = untouched(model)
    seen, out = what_modules_see(plain, paths, output_attentions=True)
    heads = 2
    if family == "gpt_neox":
        v = seen["query_key_value"][1].unflatten(-1, (heads, -1)).chunk(3, -1)[2]
    elif family == "gpt2":
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in seen["c_attn"][1].chunk(3, -1))
    else:
        v = seen["v_proj"][1].unflatten(-1, (1, -1))
    expected = {
        f"attn.{LAYER}.pattern": out.attentions[LAYER],
        f"attn.{LAYER}.z": seen["z"][0].unflatten(-1, (heads, -1)),
        f"attn.{LAYER}.v": v,
        f"mlp.{LAYER}.post": seen["mlp"][0],
    }
    if middle:
        expected[f"resid_mid.{LAYER}"] = seen["mid"][0]
    if family == "gpt2":
        expected |= {f"attn.{LAYER}.q": q, f"attn.{LAYER}.k": k}
    if family != "falcon_h1":  # there a multiplier follows
        expected |= {f"attn.{LAYER}.out": seen["z"][1], f"mlp.{LAYER}.out": seen["mlp"][1]}
    check(model, expected)


@pytest.mark.parametrize("family", ATTENTION)
def test_queries_and_keys_make_the_pattern(family):
    """Rotated as the scores read them: softmax(q k / sqrt(d)) is the pattern that transformers itself reports."""
    model = tiny_model(family)
    run = model.run(tokens(), capture=[f"attn.{LAYER}.q", f"attn.{LAYER}.k"]).captured
    q, k = (run[f"attn.{LAYER}.{site}"].transpose(1, 2) for site in "qk")
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    pattern = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf).softmax(-1)
    expected = untouched(model)(tokens(), output_attentions=True).attentions[LAYER]
    torch.testing.assert_close(pattern, expected, rtol=1e-4, atol=1e-5)


def test_mamba():
    model, name, mixer = tiny_model("mamba"), f"mamba.{LAYER}", f"backbone.layers.{LAYER}.mixer"
    paths = {part: f"{mixer}.{part}" for part in ("in_proj", "x_proj", "out_proj")}
    seen, _ = what_modules_see(untouched(model), paths)
    module = model.hf.get_submodule(mixer)
    conv_in, z = seen["in_proj"][1].chunk(2, -1)
    step, B, C = seen["x_proj"][1].split([model.hf.config.time_step_rank, 4, 4], -1)
    u, gate = seen["x_proj"][0], F.silu(z)
    before = F.conv1d(conv_in.transpose(1, 2), module.conv1d.weight, None, padding=3, groups=32)[..., :LENGTH]
    expected = {"conv_in": conv_in, "ssm_in": u, "delta": F.softplus(module.dt_proj(step)), "B": B, "C": C}
    expected |= {"gate": gate, "y": seen["out_proj"][0] / gate, "out": seen["out_proj"][1], "skip": module.D * u}
    check(model, {f"{name}.{site}": value for site, value in expected.items()})
    taps = model.run(tokens(), capture=[f"{name}.conv_taps"]).captured[f"{name}.conv_taps"]
    torch.testing.assert_close(taps.sum(2), before.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(taps[:, :, 3], conv_in * module.conv1d.weight[:, 0, 3])


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1"])
def test_mamba2(family):
    model, name = tiny_model(family), f"mamba.{LAYER}"
    mixer = f"backbone.layers.{LAYER}.mixer" if family == "mamba2" else f"model.layers.{LAYER}.mamba"
    plain = untouched(model)
    module = plain.get_submodule(mixer)
    seen, _ = what_modules_see(plain, {"in_proj": f"{mixer}.in_proj", "out_proj": f"{mixer}.out_proj"})
    projected = seen["in_proj"][1] * (module.mup_vector if family == "falcon_h1" else 1)
    z, conv_in, step = projected.split([32, module.conv_dim, 2], -1)
    mixed = F.silu(F.conv1d(conv_in.transpose(1, 2), module.conv1d.weight, module.conv1d.bias, padding=3, groups=40))
    u, B, C = mixed[..., :LENGTH].transpose(1, 2).split([32, 4, 4], -1)
    u = u.unflatten(-1, (2, 16))
    expected = {"conv_in": conv_in, "ssm_in": u, "B": B[:, :, None], "C": C[:, :, None]}
    expected |= {"delta": F.softplus(step + module.dt_bias), "gate": F.silu(z), "skip": module.D[:, None] * u}
    if family == "falcon_h1":  # its default has no norm
        expected["y"] = (seen["out_proj"][0] / F.silu(z)).unflatten(-1, (2, 16))
    check(model, {f"{name}.{site}": value for site, value in expected.items()})


@pytest.mark.parametrize("family", STATE_SPACE_FAMILIES)
@pytest.mark.parametrize("position", [0, 6, -1])
def test_states_are_those_of_transformers_cache_after_as_many_tokens(family, position):
    model, name = tiny_model(family), f"mamba.{LAYER}"
    seen = model.run(tokens(), capture=[f"{name}.state@{position}", f"{name}.writes@{position}"]).captured
    stop = LENGTH if position == -1 else position + 1
    out = untouched(model)(tokens()[:, :stop], use_cache=True)
    cache = out.cache_params if family != "falcon_h1" else out.past_key_values
    state = cache.get_recurrent_state(LAYER, state_idx=0) if family != "falcon_h1" else cache.layers[LAYER]
    if not torch.is_tensor(state):
        state = cache.get_recurrent_state(LAYER, state_idx=0)
    torch.testing.assert_close(seen[f"{name}.state@{position}"], state, rtol=1e-4, atol=1e-5)
    writes = seen[f"{name}.writes@{position}"]
    assert writes.shape[1] == stop
    torch.testing.assert_close(writes.sum(1), state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", STATE_SPACE_FAMILIES)
def test_an_edited_state_is_what_all_later_positions_go_on_from(family):
    """Forgetting everything before position 9 is like a sequence in which earlier positions wrote nothing."""
    model = tiny_model(family)
    forgotten = model.run(tokens(), edits={f"mamba.{LAYER}.state@8": torch.zeros_like}).logits
    silent = lambda delta: torch.cat([torch.zeros_like(delta[:, :9]), delta[:, 9:]], 1)  # noqa: E731
    unwritten = model.run(tokens(), edits={f"mamba.{LAYER}.delta": silent}).logits
    torch.testing.assert_close(forgotten[:, 9:], unwritten[:, 9:], rtol=1e-4, atol=1e-5)
    one = lambda writes: torch.cat([writes[:, :5] * 0, writes[:, 5:]], 1)  # noqa: E731
    both = {f"mamba.{LAYER}.writes@8": one, f"mamba.{LAYER}.state@12": lambda state: state}
    assert not torch.allclose(model.run(tokens(), edits=both).logits[:, 9:], forgotten[:, 9:], atol=1e-5)


def test_rwkv():
    model, block = tiny_model("rwkv"), f"rwkv.blocks.{LAYER}"
    paths = {part: f"{block}.attention.{part}" for part in ("key", "value", "receptance", "output")}
    paths |= {"mid": f"{block}.ln2", "post": f"{block}.feed_forward.value", "mlp": f"{block}.feed_forward"}
    seen, _ = what_modules_see(untouched(model), paths)
    r = torch.sigmoid(seen["receptance"][1])
    expected = {"r": r, "k": seen["key"][1], "v": seen["value"][1], "wkv": seen["output"][0] / r}
    expected = {f"rwkv.{LAYER}.{site}": value for site, value in expected.items()}
    expected |= {f"rwkv.{LAYER}.out": seen["output"][1], f"mlp.{LAYER}.post": seen["post"][0]}
    expected |= {f"mlp.{LAYER}.out": seen["mlp"][1], f"resid_mid.{LAYER}": seen["mid"][0]}
    check(model, expected)


def test_an_rwkv_that_was_run_before_gets_its_weights_back():
    """transformers divides the weights of deep layers when it first evaluates."""
    from universality.models.language_model import LanguageModel

    model = tiny_model("rwkv")
    plain = untouched(model)
    plain.config.rescale_every = 1
    expected = plain(tokens()).logits
    assert not torch.equal(plain.rwkv.blocks[1].attention.output.weight, model.blocks[1].attention.output.weight)
    again = LanguageModel(plain)
    torch.testing.assert_close(again.run(tokens()).logits, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.run(tokens()).logits, model.run(tokens()).logits)


def test_embeddings_and_final_norm(family):
    model = tiny_model(family)
    stack = model.family.stack
    paths = {"embed": f"{stack}.{model.family.embedding}", "final_norm": f"{stack}.{model.family.final_norm}"}
    seen, _ = what_modules_see(untouched(model), paths)
    check(model, {site: out for site, (_, out) in seen.items()})
