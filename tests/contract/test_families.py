"""What holds of every family of models."""

import copy

import pytest
import torch

from tests.conftest import LENGTH, tiny_model
from universality.errors import StudyError
from universality.models.language_model import LanguageModel, load_model


def tokens(n=3, length=LENGTH, seed=0):
    return torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(seed))


def untouched(model: LanguageModel):
    """The same weights in a model of transformers' that nobody has attached anything to."""
    plain = type(model.hf)(copy.deepcopy(model.hf.config)).eval()
    plain.load_state_dict(model.hf.state_dict())
    return plain


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
    for index, block in enumerate(model.family.blocks(plain)):
        block.register_forward_hook(lambda m, a, out, index=index: seen.__setitem__(f"resid_post.{index}", out))
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
    clean = model.run(tokens(), capture=model.sites)
    assert sorted(clean.captured) == sorted(model.sites)
    for site, shape in model.sites.items():
        lead = (3,) if site.endswith("last_state") else (3, LENGTH)
        assert tuple(clean.captured[site].shape) == (*lead, *shape), site
        patched = model.run(tokens(), edits={site: lambda value, site=site: clean.captured[site].clone()})
        torch.testing.assert_close(patched.logits, clean.logits, rtol=1e-5, atol=1e-5, msg=site)


def test_every_site_matters(family):
    """An edit that changes a value changes the logits: no site is a dead end."""
    model = tiny_model(family)
    clean = model.run(tokens()).logits
    for site in model.sites:
        edited = model.run(tokens(), edits={site: lambda value: value * 1.5 + 0.1}).logits
        assert not torch.allclose(edited, clean, atol=1e-4), site


def test_edits_do_not_reach_back_in_time(family):
    model = tiny_model(family)
    clean = model.run(tokens()).logits
    for site in model.sites:

        def at_position_9(value):
            value = value.clone()
            value[:, 9] += 1
            return value

        if not site.endswith("last_state"):
            edited = model.run(tokens(), edits={site: at_position_9}).logits
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


def test_an_unknown_site_is_named(family):
    with pytest.raises(StudyError, match=r"has no site 'resid_post\.7'; it has resid_pre\.0"):
        tiny_model(family).run(tokens(), capture=["resid_post.7"])


def test_a_damaged_folder_is_named(family, tmp_path):
    tiny_model(family).hf.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StudyError, match=str(tmp_path)):
        load_model(tmp_path)


def test_an_unknown_family_is_named(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(StudyError, match="family 'gpt2' is unknown; allowed: gpt_neox, mamba"):
        load_model(tmp_path)
