"""What holds of every family of models."""

import copy

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from tests.conftest import LENGTH, tiny_model
from universality.errors import StudyError
from universality.models.language_model import FAMILIES, LanguageModel
from universality.models.loading import load_model, open_model
from universality.models.settings import STATE_SPACE_FAMILIES
from universality.runtime import log


def tokens(n=3, length=LENGTH, seed=0):
    return torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(seed))


def untouched(model: LanguageModel):
    """The same weights in a model of transformers' that nobody has attached anything to."""
    config = copy.deepcopy(model.hf.config)
    config._attn_implementation = "eager"
    plain = type(model.hf)(config).eval()
    plain.load_state_dict(model.hf.state_dict())
    return plain


def asked(site: str) -> str:
    """A site as it is asked for: of those at single positions, the last."""
    return site.replace("@P", "@-1")


@pytest.mark.parametrize("length", [1, 2, LENGTH])
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_equal_transformers(family, batch, length):
    model = tiny_model(family)
    expected = untouched(model)(tokens(batch, length)).logits
    torch.testing.assert_close(model.run(tokens(batch, length)).logits, expected, rtol=1e-4, atol=1e-4)


def test_gradients_equal_transformers(family):
    model = tiny_model(family)
    plain = untouched(model).requires_grad_(True)
    model.hf.requires_grad_(True)
    for logits in (model.run(tokens()).logits, plain(tokens()).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    for (name, ours), theirs in zip(model.hf.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_residual_stream_equals_what_transformers_blocks_return(family):
    model = tiny_model(family)
    plain, seen = untouched(model), {}
    for index, block in enumerate(model.family.block_list(plain)):

        def keep(module, args, out, index=index):
            seen[f"resid_post.{index}"] = out if torch.is_tensor(out) else out[0]

        block.register_forward_hook(keep)
    plain(tokens())
    captured = model.run(tokens(), capture=list(seen)).captured
    assert sorted(captured) == sorted(seen)
    for site in seen:
        torch.testing.assert_close(captured[site], seen[site], rtol=1e-4, atol=1e-4)
    # Block by block: what a block reads is what the one before it wrote.
    both = model.run(tokens(), capture=["resid_post.0", "resid_pre.1"]).captured
    assert torch.equal(both["resid_post.0"], both["resid_pre.1"])


def test_every_site_has_its_shape_and_patching_clean_onto_clean_changes_nothing(family):
    model = tiny_model(family)
    sites = {asked(site): shape for site, shape in model.sites.items()}
    clean = model.run(tokens(), capture=sites)
    assert sorted(clean.captured) == sorted(sites)
    sizes = {"B": 3, "L": LENGTH, "P": LENGTH}
    for site, shape in sites.items():
        assert tuple(clean.captured[site].shape) == tuple(sizes.get(size, size) for size in shape), site
        patched = model.run(tokens(), edits={site: lambda value, site=site: clean.captured[site].clone()})
        torch.testing.assert_close(patched.logits, clean.logits, rtol=1e-5, atol=1e-5, msg=site)
    torch.testing.assert_close(model.run(tokens()).logits, clean.logits, rtol=1e-5, atol=1e-5)


def test_all_families_have_the_streams_and_those_of_a_kind_the_same_inner_sites():
    kinds = {name: {s.split(".")[0] + "." + s.split(".")[-1] for s in tiny_model(name).sites} for name in FAMILIES}
    stream = {"embed.embed", "resid_pre.0", "resid_mid.1", "resid_post.1", "final_norm.final_norm"}
    attention = {f"attn.{site}" for site in ("q", "k", "v", "pattern", "z", "out")} | {"mlp.post", "mlp.out"}
    inner = ("conv_in", "conv_taps", "ssm_in", "delta", "B", "C", "gate", "skip", "state@P", "writes@P", "y", "out")
    for name, found in kinds.items():
        assert stream <= found, name
        assert (attention <= found) == (name in ("gpt_neox", "gpt2", "llama", "falcon_h1")), name
        assert ({f"mamba.{site}" for site in inner} <= found) == (name in STATE_SPACE_FAMILIES), name
        assert (FAMILIES[name].recurrence is not None) == (name in STATE_SPACE_FAMILIES)


def shaken(value: torch.Tensor, by: float = 0.5) -> torch.Tensor:
    """Changed in a way that no norm undoes."""
    return value + by * value.roll(1, -1)


def test_every_site_matters(family):
    """An edit that changes a value changes the logits: no site is a dead end."""
    model = tiny_model(family)
    clean = model.run(tokens()).logits
    for site in map(asked, model.sites):
        edited = model.run(tokens(), edits={site: shaken}).logits
        assert not torch.allclose(edited, clean, atol=1e-5), site


def test_edits_do_not_reach_back_in_time(family):
    model = tiny_model(family)
    clean = model.run(tokens()).logits
    for site, shape in model.sites.items():
        axis = shape.index("L") if "L" in shape else None

        def at_position_9(value, axis=axis):
            value = value.clone()
            if axis is None:
                return value + 1
            value.select(axis, 9).add_(1)
            return value

        edited = model.run(tokens(), edits={site.replace("@P", "@9"): at_position_9}).logits
        torch.testing.assert_close(edited[:, :9], clean[:, :9], rtol=1e-5, atol=1e-5, msg=site)


def test_a_run_leaves_no_trace_even_when_an_edit_fails(family):
    model = tiny_model(family)
    clean = model.run(tokens()).logits

    def fail(value):
        raise RuntimeError("edit failed")

    with pytest.raises(RuntimeError, match="edit failed"):
        model.run(tokens(), capture=["resid_pre.0"], edits={"resid_post.0": fail})
    again = model.run(tokens())
    assert again.captured == {}
    assert torch.equal(again.logits, clean)


def test_without_logits_the_stream_is_the_same(family):
    model = tiny_model(family)
    run = model.run(tokens(), capture=["resid_post.1"], logits=False)
    assert run.logits is None
    assert torch.equal(
        run.captured["resid_post.1"], model.run(tokens(), capture=["resid_post.1"]).captured["resid_post.1"]
    )


def test_a_run_to_the_last_position_has_the_logits_of_the_run_there(family):
    model = tiny_model(family)
    if family == "falcon_h1":
        model.hf.model.lm_head_multiplier = model.hf.config.lm_head_multiplier = 0.5
    edits = {"resid_post.0": lambda x: 2 * x, "final_norm": lambda x: x + 1}
    whole, last = (run(tokens(), capture=["resid_mid.1"], edits=edits) for run in (model.run, model.run_to_last))
    torch.testing.assert_close(last.logits, whole.logits[:, -1], rtol=1e-5, atol=1e-5)
    assert list(last.captured) == ["resid_mid.1"]
    assert torch.equal(last.captured["resid_mid.1"], whole.captured["resid_mid.1"])


def test_the_unembedding_of_chosen_positions_is_the_runs(family):
    model = tiny_model(family)
    if family == "falcon_h1":
        model.hf.model.lm_head_multiplier = model.hf.config.lm_head_multiplier = 0.5
    run = model.run(tokens(), capture=["resid_post.1"])
    for rows, at in ((slice(None), -1), (torch.tensor([0, 2]), torch.tensor([3, LENGTH - 1]))):
        logits = model.unembed(run.captured["resid_post.1"][rows, at])
        torch.testing.assert_close(logits, run.logits[rows, at], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(family, side):
    model = tiny_model(family)
    lengths, width = (3, 9, 12), 12
    padded, mask = torch.full((3, width), -100), torch.zeros(3, width, dtype=torch.bool)
    places = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for row, place in enumerate(places):
        padded[row, place], mask[row, place] = tokens(length=width)[row, : lengths[row]], True
    names = [site for site, shape in model.sites.items() if shape[:2] == ("B", "L")]
    run = model.run(padded, capture=names, mask=mask)
    losses = model.token_losses(padded, mask=mask)
    for row, place in enumerate(places):
        alone = model.run(padded[row : row + 1, place], capture=names)
        torch.testing.assert_close(run.logits[row, place], alone.logits[0], rtol=1e-4, atol=1e-4)
        for site in names:
            expected = alone.captured[site][0]
            torch.testing.assert_close(run.captured[site][row, place], expected, rtol=1e-4, atol=1e-4, msg=site)
        expected = model.token_losses(padded[row : row + 1, place])
        torch.testing.assert_close(losses[row].sum(), expected.sum(), rtol=1e-4, atol=1e-4)
    mean = model.loss(padded, mask=mask)
    torch.testing.assert_close(mean, losses.sum() / (sum(lengths) - 3))


def test_padding_that_cannot_be_right_is_refused(family):
    model = tiny_model(family)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    with pytest.raises(StudyError, match="mask: row 0 must hold real tokens in one stretch"):
        model.run(tokens(2, 3), mask=mask)
    with pytest.raises(StudyError, match=r"site 'resid_pre\.0': edits and single positions need padding on the right"):
        model.run(tokens(1, 3), mask=torch.tensor([[0, 1, 1]]), edits={"resid_pre.0": lambda value: value})


def test_loss_and_splicing_are_their_definitions(family):
    model = tiny_model(family)
    logits = model.run(tokens(), capture=["resid_mid.1"])
    by_hand = -torch.log_softmax(logits.logits, -1)[:, :-1].gather(2, tokens()[:, 1:, None])
    torch.testing.assert_close(model.loss(tokens()), by_hand.mean())
    same = model.spliced_loss(tokens(), {"resid_mid.1": logits.captured["resid_mid.1"]})
    torch.testing.assert_close(same, by_hand.mean(), rtol=1e-5, atol=1e-5)
    nothing = model.spliced_loss(tokens(), {"resid_mid.1": torch.zeros(3, LENGTH, 16)})
    assert abs(nothing - same) > 1e-4
    with pytest.raises(StudyError, match=r"'resid_mid\.1' returns \(2, 2\), not a tensor of shape \(3, 16, 16\)"):
        model.spliced_loss(tokens(), {"resid_mid.1": torch.zeros(2, 2)})


def test_sequences_beyond_the_trained_length_are_right_or_refused(family):
    model = tiny_model(family)
    longer = tokens(2, 2 * LENGTH)
    if family == "gpt2":
        with pytest.raises(StudyError, match="gpt2: 32 tokens are more than the 16 positions it was made for"):
            model.run(longer)
    else:
        torch.testing.assert_close(model.run(longer).logits, untouched(model)(longer).logits, rtol=1e-4, atol=1e-4)


def test_a_folder_is_checked_against_transformers_when_it_is_loaded(family, tmp_path):
    model = tiny_model(family)
    model.hf.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(loaded.run(tokens()).logits, model.run(tokens()).logits)
    assert load_model(tmp_path, products="bfloat16").run(tokens()).logits.dtype == torch.float32


def test_products_in_bfloat16_cost_a_little_and_say_so(family, tmp_path, monkeypatch):
    monkeypatch.setattr("universality.models.loading.has_bf16_products", lambda device: True)  # torch emulates them
    model = tiny_model(family)
    model.hf.save_pretrained(tmp_path)
    rounded = load_model(tmp_path, products="bfloat16")
    error = rounded.run(tokens()).logits - model.run(tokens()).logits
    share = float(error.norm() / model.run(tokens()).logits.norm())
    assert 1e-6 < share < 0.03
    assert 0.2 < rounded.product_error / share < 5
    names = [site for site in model.sites if "@" not in site]
    tapped = rounded.run(tokens(), capture=names)
    torch.testing.assert_close(tapped.logits, rounded.run(tokens()).logits, rtol=0.05, atol=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        StudyError, match="device cuda is asked for, but torch finds none on this machine; allowed: cpu"
    ):
        load_model(tmp_path, device="cuda")


def test_weights_that_are_not_finite_are_named(family, tmp_path):
    model = tiny_model(family)
    name, weight = next((n, p) for n, p in model.hf.named_parameters() if p.ndim == 2)
    weight.view(-1)[3] = torch.nan
    model.hf.save_pretrained(tmp_path)
    with pytest.raises(StudyError, match=f"{tmp_path}: .*{name.rsplit('.', 2)[-1]} holds values that are not finite"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("site", "message"),
    [("resid_mid.1", "patching clean onto clean changes site resid_mid.1"), ("resid_post.0", "logits differ")],
)
def test_a_family_whose_forward_is_wrong_is_caught_at_load(family, site, message, monkeypatch):
    """Once a site that changes its value with every use, once a forward that is not transformers'."""
    plain, calls = untouched(tiny_model(family)), []
    forward = FAMILIES[family].forward

    def wrong(block, hidden, taps, layer, arguments):
        def tap(name, value):
            calls.append(name)
            # Three runs are right, two for the logits and one that looks at sites; the one that patches is not.
            scale = {"resid_mid.1": 0.1 * max(0, calls.count(name) - 3), "resid_post.0": 0.5}[site]
            at = "resid_mid.1" if site == "resid_mid.1" else "resid_mid.0"
            return taps(name, shaken(value, scale) if name == at else value)

        spy = copy.copy(taps)
        spy.__class__ = type("Spy", (type(taps),), {"__call__": lambda self, name, value: tap(name, value)})
        return forward(block, hidden, spy, layer, arguments)

    monkeypatch.setitem(FAMILIES, family, FAMILIES[family]._replace(forward=wrong))
    with pytest.raises(StudyError, match=f"here: {family}: {message}"):
        open_model(plain.requires_grad_(False), "here")


def amplifying() -> MambaForCausalLM:
    """Deep, with large random weights: rounding moves its logits by a thousandth and more."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=24, initializer_range=0.3, time_step_rank=4, use_cache=False
    )
    return MambaForCausalLM(config).eval().requires_grad_(False)


def test_a_model_that_amplifies_rounding_is_held_to_float64(monkeypatch, caplog):
    hf = amplifying()
    long = torch.arange(70)[None]
    theirs = copy.deepcopy(hf)(long).logits
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("INFO"):
        model = open_model(hf, "here")
    assert "here: mamba: rounding moves its logits by" in caplog.text
    assert not torch.allclose(model.run(long).logits, theirs, rtol=1e-3, atol=1e-4)  # or nothing was tested


def test_a_model_that_amplifies_rounding_may_not_be_another(monkeypatch):
    forward = FAMILIES["mamba"].forward
    monkeypatch.setitem(FAMILIES, "mamba", FAMILIES["mamba"]._replace(forward=lambda *given: 1.01 * forward(*given)))
    with pytest.raises(StudyError, match=r"here: mamba: logits differ from transformers' by up to .* rounding moves"):
        open_model(amplifying(), "here")


def test_an_unknown_site_is_named(family):
    with pytest.raises(StudyError, match=r"has no site 'resid_post\.7'; it has embed, resid_pre\.0"):
        tiny_model(family).run(tokens(), capture=["resid_post.7"])


def test_a_damaged_folder_is_named(family, tmp_path):
    tiny_model(family).hf.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StudyError, match=str(tmp_path)):
        load_model(tmp_path)


def test_a_position_beyond_the_sequence_is_named():
    with pytest.raises(StudyError, match=r"site 'mamba\.0\.state@16': no such position in a sequence of 16 tokens"):
        tiny_model("mamba").run(tokens(), capture=["mamba.0.state@16"])
    with pytest.raises(StudyError, match=r"site 'mamba\.0\.state@P': no such position"):
        tiny_model("mamba").run(tokens(), capture=["mamba.0.state@P"])


def test_an_unknown_family_is_named(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(num_hidden_layers=1, hidden_size=8, ffn_dim=8, num_attention_heads=2, vocab_size=50)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        StudyError, match="family 'opt' is unknown; allowed: gpt_neox, gpt2, llama, mamba, mamba2, rwkv"
    ):
        load_model(tmp_path)


def test_an_edit_that_changes_shape_is_refused_and_its_dtype_is_put_right(family):
    model = tiny_model(family)
    clean = model.run(tokens()).logits
    for site, shape in model.sites.items():
        with pytest.raises(StudyError, match=f"the edit of site '{asked(site)}' returns"):
            model.run(tokens(), edits={asked(site): lambda value: value.mean(0, keepdim=True)[:, :1]})
        if "L" in shape:
            kept = model.run(tokens(), edits={site: lambda value: value.double()}).logits
            torch.testing.assert_close(kept, clean, rtol=1e-5, atol=1e-5, msg=site)
    with pytest.raises(StudyError, match="returns NoneType, not a tensor"):
        model.run(tokens(), edits={"resid_pre.0": lambda value: None})


def test_every_parameter_alone_gets_its_gradient(family):
    """Kernels without a backward pass must not be taken because only something inside a mixer wants a gradient."""
    model = tiny_model(family)
    plain = untouched(model)
    for (name, ours), theirs in zip(model.hf.named_parameters(), plain.parameters(), strict=True):
        grads = []
        for parameter, logits_of in (
            (ours, lambda: model.run(tokens()).logits),
            (theirs, lambda: plain(tokens()).logits),
        ):
            for other in (*model.hf.parameters(), *plain.parameters()):
                other.requires_grad_(other is parameter)
            grads.append(torch.autograd.grad(logits_of().square().sum(), parameter)[0])
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_a_run_within_a_run_is_refused(family):
    model = tiny_model(family)
    with pytest.raises(StudyError, match="a run within a run"):
        model.run(tokens(), edits={"resid_pre.1": lambda value: model.run(tokens()).logits})
    assert model.run(tokens()).logits.shape[0] == 3


@pytest.mark.parametrize("family", STATE_SPACE_FAMILIES)
def test_one_position_has_one_name_in_a_run_and_none_from_the_end_beside_padding(family):
    model = tiny_model(family)
    with pytest.raises(StudyError, match=r"sites 'mamba\.0\.state@(-1|15)' and 'mamba\.0\.state@(-1|15)' are one"):
        model.run(tokens(), capture=["mamba.0.state@15", "mamba.0.state@-1"])
    mask = torch.ones(3, LENGTH)
    mask[0, 9:] = 0
    with pytest.raises(StudyError, match=r"site 'mamba\.0\.state@-1': beside padding, positions are counted from 0"):
        model.run(tokens(), capture=["mamba.0.state@-1"], mask=mask)
    seen = model.run(tokens(), capture=["mamba.0.state@8"], mask=mask).captured["mamba.0.state@8"]
    alone = model.run(tokens()[:1, :9], capture=["mamba.0.state@-1"]).captured["mamba.0.state@-1"]
    torch.testing.assert_close(seen[:1], alone, rtol=1e-4, atol=1e-5)


def test_a_mask_that_does_not_fit_and_a_token_that_is_none_are_errors(family):
    model = tiny_model(family)
    with pytest.raises(StudyError, match=r"mask: has shape \(2, 5\), the tokens have \(3, 16\)"):
        model.run(tokens(), mask=torch.ones(2, 5))
    with pytest.raises(StudyError, match="tokens: a sequence needs at least one token"):
        model.run(tokens()[:, :0])
    wrong = tokens().clone()
    wrong[0, 3] = 999
    with pytest.raises(IndexError):
        model.run(wrong, mask=torch.ones(3, LENGTH))


def test_what_is_captured_does_not_change_what_is_computed(family, tmp_path):
    """Fused kernels and taps round at the same places, also where products are in bfloat16."""
    model = tiny_model(family)
    model.hf.save_pretrained(tmp_path)
    names = [site for site in model.sites if "@" not in site]
    for products, close in (("float32", 1e-5), ("bfloat16", 3e-4)):
        loaded = load_model(tmp_path, products=products)
        alone = loaded.run(tokens(), capture=["resid_post.1"]).captured["resid_post.1"]
        among = loaded.run(tokens(), capture=names).captured["resid_post.1"]
        assert float((alone - among).norm() / alone.norm()) < close, products
