"""How good SAEs are after the same rows in the same order: ours against sae-lens' TopK, three seeds each, in turn.

    python benchmarks/sae_quality.py planted
    python benchmarks/sae_quality.py study --layer 2     # the stored residual stream of results/, after `make run`

planted: rows are sums of 8 of 512 random directions in 128 dimensions, which are to be found. Same k, features,
batches, schedule and learning rate; float32 products. Each begins as its library has it: b_dec at the mean here, at
zero there. Both are measured on held-out rows by the same code: explained variance, share of features alive; for
planted rows the mean over true directions of the largest cosine with a decoder row; for the study the loss recovered.
Prints a table, for each measure whether ours is better or within the peer's spread over seeds, and last ratio=<median
over seeds of ours over theirs, of explained variance>.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peer import ENVIRONMENT, Peer
from safetensors.torch import save_file
from side_by_side import use_threads

from universality.activations.batches import StoredBatches
from universality.activations.store import ActivationStore
from universality.corpus.tokens import read_tokens
from universality.models.loading import load_model
from universality.saes.base import SAE
from universality.saes.folder import save_sae
from universality.saes.load import load_sae
from universality.saes.settings import SAETraining, TopKSettings
from universality.saes.training import Scaled, Trainee, Wanted

SEEDS = (0, 1, 2)
TRUE, WIDTH, ACTIVE = 512, 128, 8
HELD_OUT = 20_000


class Data(NamedTuple):
    """Rows to train on, in their order, and held-out ones, all times `scale`; what only one kind of data has."""

    rows: torch.Tensor
    held_out: torch.Tensor
    scale: float
    directions: torch.Tensor | None = None
    site: str = ""


def planted(options) -> Data:
    """Features whose frequencies fall off as the root of their rank, values of one and more."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((TRUE, WIDTH)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rarity = np.sqrt(np.arange(1, TRUE + 1, dtype=np.float32))
    n_rows, parts = options.steps * options.batch + HELD_OUT, []
    for start in range(0, n_rows, 8192):
        size = min(8192, n_rows - start)
        waiting = rng.exponential(size=(size, TRUE)).astype(np.float32) * rarity
        active = np.argpartition(waiting, ACTIVE, axis=1)[:, :ACTIVE]
        codes = np.zeros((size, TRUE), np.float32)
        np.put_along_axis(codes, active, 1 + rng.exponential(size=active.shape).astype(np.float32), axis=1)
        parts.append(torch.from_numpy(codes @ directions))
    rows = torch.cat(parts)
    scale = WIDTH**0.5 / float(rows.norm(dim=1).mean())
    rows = rows * scale
    return Data(rows[:-HELD_OUT], rows[-HELD_OUT:], scale, torch.from_numpy(directions))


def stored(options) -> Data:
    site = f"resid_post.{options.layer}"
    folder = options.results / "activations" / options.model / site
    stores = {s: ActivationStore(sorted((folder / s).glob("shard_*"))) for s in ("train", "evaluation")}
    batches = StoredBatches(stores["train"])
    scale = batches.d_in**0.5 / batches.statistics().mean_norm
    with closing(batches.batches(options.batch, 0)) as taken:
        rows = torch.cat([next(taken) for _ in range(options.steps)]) * scale
    return Data(rows, stores["evaluation"].read(0, stores["evaluation"].n_rows) * scale, scale, site=site)


def train_ours(data: Data, options, seed: int, out: Path) -> None:
    d = data.rows.shape[1]
    training = SAETraining(
        d_sae=options.features, learning_rate=options.rate, batch_size=options.batch, steps=options.steps,
        warmup_steps=options.steps // 20, sparsity_warmup_steps=0, decay_fraction=0.2, dead_steps=options.dead_steps,
        gradient_norm=1.0, products="float32", data_seed=0, checkpoint_steps=10**9, log_steps=10**9,
    )  # fmt: skip
    variant = TopKSettings(k=options.k, k_aux=d // 2, aux_coefficient=1 / 32)
    scaled = Scaled([1.0], torch.ones(d), data.rows.mean(0), [1.0], [d])
    trainee = Trainee(Wanted(variant, seed, out), training, scaled)
    for number, rows in enumerate(data.rows.split(options.batch)):
        trainee.step(rows, number)
    save_sae(trainee.sae.eval(), out, {})


@torch.no_grad()
def measure(sae: SAE, data: Data, options) -> dict[str, float]:
    x_hat, fired = [], torch.zeros(sae.d_sae, dtype=torch.bool)
    for part in data.held_out.split(4096):
        pattern, values = sae.encode_sparse(part)
        fired[pattern.index] = True
        x_hat.append(sae.from_codes(part, pattern, values))
    error = (data.held_out - torch.cat(x_hat)).square().sum()
    found = {
        "explained variance": float(1 - error / (data.held_out - data.held_out.mean(0)).square().sum()),
        "alive share": float(fired.float().mean()),
    }
    if data.directions is not None:
        cosines = data.directions @ torch.nn.functional.normalize(sae.W_dec, dim=1).T
        found["mean max cosine"] = float(cosines.max(1).values.mean())
    else:
        found["loss recovered"] = loss_recovered(sae, data, options)
    return found


def loss_recovered(sae: SAE, data: Data, options) -> float:
    """All but end-of-text tokens are replaced, and predictions made at them are counted (as in saes.splicing)."""
    model = load_model(options.results / "models" / options.model)
    sequences = read_tokens(options.results / "corpus" / "tokens", "evaluation")
    tokens = torch.from_numpy(sequences.tokens[:256]).long()
    kept = tokens != sequences.end_of_text

    def edited(replace) -> dict:
        return {data.site: lambda value: torch.where(kept[..., None], replace(value), value)}

    def through(value: torch.Tensor) -> torch.Tensor:
        return (sae(value.flatten(0, 1) * data.scale) / data.scale).view_as(value)

    clean, zero, spliced = (
        float(model.token_losses(tokens, edits)[kept[:, :-1]].mean())
        for edits in ({}, edited(torch.zeros_like), edited(through))
    )
    return (zero - spliced) / (zero - clean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["planted", "study"])
    sizes = {"layer": 2, "features": 1024, "k": 16, "batch": 1024, "steps": 700, "dead-steps": 50, "threads": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=0.001)
    parser.add_argument("--model", default="neox")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--python", type=Path, default=ENVIRONMENT / "bin" / "python", help="the peers' interpreter")
    options = parser.parse_args()
    if options.data == "planted":
        options.k = ACTIVE
    use_threads(options.threads)
    data = planted(options) if options.data == "planted" else stored(options)
    found: dict[str, list[dict[str, float]]] = {"ours": [], "sae-lens": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file({"rows": data.rows}, folder / "rows.safetensors")
        job = {
            "rows": str(folder / "rows.safetensors"), "out": str(folder), "d_sae": options.features, "k": options.k,
            "batch": options.batch, "learning_rate": options.rate, "warmup_steps": options.steps // 20,
            "decay_steps": options.steps // 5, "dead_steps": options.dead_steps, "threads": options.threads,
        }  # fmt: skip
        with closing(Peer("sae_training_runs", job, options.python)) as peer:
            for seed in SEEDS:
                train_ours(data, options, seed, folder / f"ours_{seed}")
                peer.ask(json.dumps(seed))
                for name, path in (("ours", f"ours_{seed}"), ("sae-lens", f"seed_{seed}")):
                    found[name].append(measure(load_sae(folder / path), data, options))
    for key in found["ours"][0]:
        ours, theirs = ([one[key] for one in found[name]] for name in ("ours", "sae-lens"))
        spread = max(theirs) - min(theirs)
        verdict = "no worse" if statistics.mean(ours) >= statistics.mean(theirs) - spread else "worse"
        numbers = "  ".join(
            f"{name} " + " ".join(f"{v:.4f}" for v in v_) for name, v_ in (("ours", ours), ("sae-lens", theirs))
        )
        print(f"{key:20s} {numbers}  {verdict}")
    pairs = zip(found["ours"], found["sae-lens"], strict=True)
    print(f"ratio={statistics.median(a['explained variance'] / b['explained variance'] for a, b in pairs):.4f}")


if __name__ == "__main__":
    main()
