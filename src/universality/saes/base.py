"""Sparse autoencoders of the form

    codes = activation((x - b_dec) @ W_enc + b_enc)        [B, F]
    x_hat = codes @ W_dec + b_dec                          [B, d_in]

with a variant's own activation and loss. Stored as sae-lens 6 folders: cfg.json and sae_weights.safetensors with
W_enc [d_in, F], b_enc [F], W_dec [F, d_in], b_dec [d_in].
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from universality.errors import StudyError
from universality.storage import read_json, read_tensors, replacing, write_json, write_table, write_tensors


class SAE(nn.Module, ABC):
    """Base of all variants; a variant gives `activate` and `loss`."""

    architecture: ClassVar[str]
    """Name of the variant in sae-lens."""

    def __init__(self, d_in: int, d_sae: int):
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def initialise(self, data_mean: torch.Tensor, decoder_norm: float, generator: torch.Generator) -> None:
        """Random decoder directions of one norm, the encoder their transpose, b_dec at the data's mean [d_in]."""
        with torch.no_grad():
            directions = torch.randn(self.W_dec.shape, generator=generator)
            self.W_dec.copy_(decoder_norm * directions / directions.norm(dim=1, keepdim=True))
            self.W_enc.copy_(self.W_dec.T)
            self.b_dec.copy_(data_mean)

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.b_enc - self.b_dec @ self.W_enc, x, self.W_enc)

    @abstractmethod
    def activate(self, pre: torch.Tensor) -> torch.Tensor:
        """Codes [B, F] of pre-activations [B, F]."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes [B, F] of inputs x [B, d_in]; most are zero."""
        return self.activate(self.pre_activations(x))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.b_dec, codes, self.W_dec)

    @abstractmethod
    def loss(self, x: torch.Tensor, warmth: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, codes [B, F]) on a batch; `warmth` rises from 0 to 1 over the warm-up."""

    def after_step(self) -> None:
        """Called after every optimiser step."""

    def config(self) -> dict:
        """The variant's own keys of cfg.json."""
        return {}

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Make an SAE trained on `scale * x` one that reads and writes x; the codes stay the same."""
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)


def save_sae(sae: SAE, out: Path, metadata: dict, curves: dict[str, list]) -> None:
    """Write a sae-lens 6 folder, with the training curves as training.parquet."""
    d_in, d_sae = sae.W_enc.shape
    cfg = {
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "architecture": sae.architecture,
        "metadata": metadata,
        **sae.config(),
    }
    weights = {name: np.ascontiguousarray(p.detach().numpy()) for name, p in sae.named_parameters()}
    with replacing(out) as folder:
        folder.mkdir()
        write_json(folder / "cfg.json", cfg)
        write_tensors(folder / "sae_weights.safetensors", weights)
        write_table(folder / "training.parquet", curves)


def read_sae_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """cfg and weights of a sae-lens folder. Raises StudyError if shapes disagree with cfg."""
    cfg = read_json(folder / "cfg.json")
    weights = {name: torch.from_numpy(a) for name, a in read_tensors(folder / "sae_weights.safetensors").items()}
    required = ("architecture", "d_in", "d_sae") + (("k",) if cfg.get("architecture") == "topk" else ())
    missing = [key for key in required if key not in cfg]
    if missing:
        raise StudyError(f"{folder / 'cfg.json'}: lacks {missing[0]!r}")
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, shape in shapes.items():
        if name not in weights or tuple(weights[name].shape) != shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise StudyError(f"{folder}: {name} should have shape {shape}, found {found}")
    return cfg, weights
