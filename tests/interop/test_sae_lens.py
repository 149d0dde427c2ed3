"""Folders of dictionaries against the libraries that have them: sae-lens, dictionary_learning, sparsify, OpenMOSS.

These run in an environment of their own (sae_lens/requirements.lock, made once in .venv-sae-lens): once to save
dictionaries by their own means (sae_lens/make.py), which must open here; once for sae-lens to read what is written here
(sae_lens/encode.py): every variant, and what it saved itself, read and written again.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.interop.environment import peer_python
from universality.saes.build import build_sae
from universality.saes.folder import save_sae
from universality.saes.load import load_sae, load_with_metadata
from universality.saes.settings import (
    BatchTopKSettings,
    GatedSettings,
    JumpReLUSettings,
    MatryoshkaSettings,
    ReluL1Settings,
    TopKSettings,
    TranscoderSettings,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sae_lens")]  # one worker: each library is started once

HERE = Path(__file__).parent / "sae_lens"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
D, F = 8, 24
AUX = {"k": 4, "k_aux": 1, "aux_coefficient": 0.0}
SITES = {"input": "resid_mid", "target": "mlp.out"}
VARIANTS = {
    "topk": TopKSettings(**AUX),
    "batchtopk": BatchTopKSettings(**AUX),
    "matryoshka": MatryoshkaSettings(**AUX, prefixes=[8]),
    "standard": ReluL1Settings(l1_coefficient=1.0),
    "jumprelu": JumpReLUSettings(l0_coefficient=1.0, bandwidth=1.0, initial_threshold=0.5),
    "gated": GatedSettings(l1_coefficient=1.0),
    "transcoder": TranscoderSettings(**AUX, **SITES),
    "skip_transcoder": TranscoderSettings(**AUX, **SITES, skip=True),
}
MADE = {"sae_lens": 81, "dictionary_learning": 8, "sparsify": 4, "openmoss": 30}
"""How many folders make.py makes for each library."""


def run(script: str, folder: Path) -> None:
    python = peer_python("sae-lens")
    done = subprocess.run([python, "-I", HERE / script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def random_sae(variant):
    torch.manual_seed(0)
    sae = build_sae(variant, F, [D, D + 3] if isinstance(variant, TranscoderSettings) else [D])
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "log_threshold":
                parameter.normal_(std=0.5)
    if hasattr(sae, "threshold") and isinstance(sae.threshold, torch.Tensor):
        sae.threshold.fill_(0.8)
    return sae.eval()


@pytest.fixture(scope="session")
def theirs(tmp_path_factory) -> Path:
    """What the libraries saved: LIBRARY/NAME, and LIBRARY/NAME.safetensors with x, codes, y_hat."""
    out = tmp_path_factory.mktemp("theirs")
    run("make.py", out)
    return out


@pytest.fixture(scope="session")
def read_there(theirs, tmp_path_factory) -> Path:
    """What sae-lens makes of every variant, and of its own folders after they were read and written here."""
    folders = tmp_path_factory.mktemp("ours")
    for name, variant in VARIANTS.items():
        metadata = {"model_name": "neox", "hook_name": "resid_post.3", "seed": 5, "variant": {"k": 4}}
        save_sae(random_sae(variant), folders / name, metadata)
        save_file({"x": torch.randn(64, D)}, folders / f"{name}.safetensors")
    for folder in names(theirs / "sae_lens"):
        sae, metadata = load_with_metadata(folder)
        save_sae(sae, folders / f"again_{folder.name}", metadata)
        x = load_file(f"{folder}.safetensors")["x"]
        save_file({"x": x}, folders / f"again_{folder.name}.safetensors")
    run("encode.py", folders)
    return folders


def names(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def metadata_there(read_there: Path, name: str) -> dict:
    with safe_open(read_there / f"{name}.out.safetensors", "pt") as file:
        return json.loads(file.metadata()["metadata"])


def compare(what: str, found: dict[str, torch.Tensor], due: dict[str, torch.Tensor]) -> None:
    for key in ("codes", "y_hat"):
        torch.testing.assert_close(found[key], due[key], **CLOSE, msg=lambda text, key=key: f"{what} {key}: {text}")
    assert float((due["codes"] > 0).float().mean()) > 0, what


@torch.no_grad()
def computed_here(folder: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    sae = load_sae(folder)
    return {"codes": sae.encode(x), "y_hat": sae(x)}


@pytest.mark.parametrize("library", MADE)
def test_what_a_library_saved_has_its_codes_here(library, theirs):
    folders = names(theirs / library)
    assert len(folders) == MADE[library]
    for folder in folders:
        due = load_file(f"{folder}.safetensors")
        compare(folder.name, computed_here(folder, due["x"]), due)


@pytest.mark.parametrize("library", MADE)
def test_what_was_read_can_be_written(library, theirs, tmp_path):
    for folder in names(theirs / library):
        sae, metadata = load_with_metadata(folder)
        save_sae(sae, tmp_path / folder.name, metadata)
        x = load_file(f"{folder}.safetensors")["x"]
        compare(folder.name, computed_here(tmp_path / folder.name, x), computed_here(folder, x))


@pytest.mark.parametrize("name", VARIANTS)
def test_sae_lens_reads_every_variant(name, read_there):
    x = load_file(read_there / f"{name}.safetensors")["x"]
    sae = random_sae(VARIANTS[name])
    with torch.no_grad():
        compare(name, load_file(read_there / f"{name}.out.safetensors"), {"codes": sae.encode(x), "y_hat": sae(x)})
    metadata = metadata_there(read_there, name)
    assert (metadata["model_name"], metadata["hook_name"], metadata["seed"]) == ("neox", "resid_post.3", 5)


def test_what_sae_lens_saved_comes_back_to_it_the_same(read_there, theirs):
    for folder in names(theirs / "sae_lens"):
        back = load_file(read_there / f"again_{folder.name}.out.safetensors")
        compare(folder.name, back, load_file(f"{folder}.safetensors"))
        first = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert metadata_there(read_there, f"again_{folder.name}") == first
