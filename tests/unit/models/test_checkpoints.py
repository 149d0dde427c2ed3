"""Models from elsewhere, in the formats of Pythia, of Mamba in transformers, and of state-spaces' own Mamba."""

import json
import shutil

import pytest
import torch

from tests.conftest import tiny_model
from universality.corpus.tokenizer import load_tokenizer, train_bpe
from universality.errors import StudyError
from universality.models.checkpoints import import_model
from universality.models.loading import load_model
from universality.models.settings import FolderModel, HubModel


def checkpoint(folder, family, corpus, vocab_size=304):
    """A folder as the hub has it: padded vocabulary, safetensors, the tokenizer beside."""
    model = tiny_model(family, vocab_size=vocab_size)
    model.hf.save_pretrained(folder)
    load_tokenizer(corpus / "tokenizer").save_pretrained(folder)
    return model


def state_spaces_checkpoint(folder, family="mamba"):
    model = tiny_model(family, vocab_size=304)
    config = model.hf.config
    native = {"d_model": config.hidden_size, "n_layer": config.num_hidden_layers, "vocab_size": 300}
    native |= {"ssm_cfg": {"d_state": config.state_size}, "rms_norm": True, "pad_vocab_size_multiple": 8}
    native |= {"tie_embeddings": config.tie_word_embeddings}
    if family == "mamba2":
        native["ssm_cfg"] |= {"layer": "Mamba2", "headdim": config.head_dim}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(native))
    weights = {k.replace("embeddings", "embedding"): v for k, v in model.hf.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")
    return model


def settings(folder, family):
    return FolderModel(family=family, path=str(folder), n_layers=2, d_model=16)


def test_a_transformers_folder(corpus, tmp_path, family):
    model = checkpoint(tmp_path / "in", family, corpus)
    import_model("mine", settings(tmp_path / "in", family), corpus / "tokenizer", tmp_path / "out")
    tokens = torch.randint(0, 300, (2, 9))
    torch.testing.assert_close(load_model(tmp_path / "out").run(tokens).logits, model.run(tokens).logits)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_state_spaces_folder(corpus, tmp_path, family):
    model = state_spaces_checkpoint(tmp_path / "in", family)
    import_model("mine", settings(tmp_path / "in", family), corpus / "tokenizer", tmp_path / "out")
    tokens = torch.randint(0, 300, (2, 9))
    torch.testing.assert_close(load_model(tmp_path / "out").run(tokens).logits, model.run(tokens).logits)


def test_code_in_a_state_spaces_checkpoint_is_not_run(corpus, tmp_path):
    state_spaces_checkpoint(tmp_path / "in")

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"backbone.embedding.weight": Payload()}, tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(StudyError, match=r"pytorch_model\.bin: cannot be read"):
        import_model("mine", settings(tmp_path / "in", "mamba"), corpus / "tokenizer", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_another_tokenizer_is_refused_naming_both(corpus, tmp_path):
    checkpoint(tmp_path / "in", "gpt_neox", corpus)
    train_bpe([f"another text {n}" for n in range(300)], 290).save_pretrained(tmp_path / "in")
    shutil.copytree(corpus / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "origin.json").write_text('{"origin": "EleutherAI/pythia-160m"}')
    message = r"models\.zoo\.mine \(.*in\): its tokenizer \(290 tokens\) is not that of EleutherAI/pythia-160m \(300 "
    with pytest.raises(StudyError, match=message):
        import_model("mine", settings(tmp_path / "in", "gpt_neox"), tmp_path / "tokenizer", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "mamba"}, "is of family gpt_neox, the study says mamba"),
        ({"n_layers": 3}, "has 2 layers, the study says n_layers=3"),
        ({"d_model": 32}, "has width 16, the study says d_model=32"),
        ({"path": "nowhere"}, r"models\.zoo\.mine \(nowhere\): no such folder"),
    ],
)
def test_a_model_that_is_not_what_the_study_says(corpus, tmp_path, change, message):
    checkpoint(tmp_path / "in", "gpt_neox", corpus)
    values = {"family": "gpt_neox", "path": str(tmp_path / "in"), "n_layers": 2, "d_model": 16} | change
    with pytest.raises(StudyError, match=message):
        import_model("mine", FolderModel(**values), corpus / "tokenizer", tmp_path / "out")


def test_fewer_embeddings_than_tokens(corpus, tmp_path):
    checkpoint(tmp_path / "in", "gpt_neox", corpus, vocab_size=200)
    with pytest.raises(StudyError, match="has 200 embeddings for 300 tokens"):
        import_model("mine", settings(tmp_path / "in", "gpt_neox"), corpus / "tokenizer", tmp_path / "out")


def test_a_hub_name_without_network_is_one_line(corpus, tmp_path):
    model = HubModel(family="gpt_neox", name="EleutherAI/pythia-160m", n_layers=12, d_model=768)
    with pytest.raises(StudyError, match=r"models\.zoo\.pythia \(EleutherAI/pythia-160m\): cannot be") as caught:
        import_model("pythia", model, corpus / "tokenizer", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_lacks_a_tensor_is_named(corpus, tmp_path):
    from safetensors.torch import load_file, save_file

    checkpoint(tmp_path / "in", "gpt_neox", corpus)
    weights = load_file(tmp_path / "in" / "model.safetensors")
    del weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(StudyError, match=r"lacks 'gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight'"):
        import_model("mine", settings(tmp_path / "in", "gpt_neox"), corpus / "tokenizer", tmp_path / "out")


def test_a_transformers_folder_that_keeps_native_keys_is_read_as_transformers(corpus, tmp_path):
    """The hub's mamba-130m-hf still has d_model and n_layer in its config."""
    checkpoint(tmp_path / "in", "mamba", corpus)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"d_model": 16, "n_layer": 2, "ssm_cfg": {}}))
    import_model("mine", settings(tmp_path / "in", "mamba"), corpus / "tokenizer", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_config_of_no_known_format_is_named(corpus, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text('{"d_model": 8}')
    with pytest.raises(StudyError, match=r"config\.json: has neither model_type"):
        import_model("mine", settings(tmp_path / "in", "mamba"), corpus / "tokenizer", tmp_path / "out")
