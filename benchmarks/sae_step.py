"""One SAE training step, or encoding to sparse codes: ours against sae-lens' or dictionary_learning's, in turn.

    python benchmarks/sae_step.py                                       # TopK, sae-lens with autocast
    python benchmarks/sae_step.py --peer sae_lens_float32
    python benchmarks/sae_step.py --peer dictionary_learning            # which has float32 alone
    python benchmarks/sae_step.py --variant standard                    # ReLU-L1 at an L0 of 150
    python benchmarks/sae_step.py --encode --peer sae_lens_sparse       # 100,000 tokens to sparse codes (training with
                                                                        # its sparse codes does not run on a CPU)
    python benchmarks/sae_step.py --growth                              # ours, by number of features and by k

Same weights and batches for both. Ours has bfloat16 products and float32 weights, as autocast does, against every peer;
--products float32 is for a like comparison with those without. A step is all that training does between two batches:
forward, backward, clipping, Adam, counting what fired. Prints medians, peak memory over that of weights and optimiser
and, last, ratio=<median of theirs over ours>.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peer import ENVIRONMENT, Peer
from safetensors.torch import save_file
from side_by_side import in_turn, peak_memory, ratio, table, use_threads

from universality.saes.settings import ReluL1Settings, SAETraining, TopKSettings
from universality.saes.training import Scaled, Trainee, Wanted

PEERS = {
    "sae_lens": {"library": "sae_lens", "autocast": True, "sparse": False},
    "sae_lens_float32": {"library": "sae_lens", "autocast": False, "sparse": False},
    "sae_lens_sparse": {"library": "sae_lens", "autocast": True, "sparse": True},
    "dictionary_learning": {"library": "dictionary_learning", "autocast": False, "sparse": False},
}
L1 = 5.0
ENCODED = 98_304


def training(options, d_sae: int) -> SAETraining:
    return SAETraining(
        d_sae=d_sae, learning_rate=4e-4, batch_size=options.batch, steps=10**9, warmup_steps=0, sparsity_warmup_steps=0,
        decay_fraction=0.0, dead_steps=10**6, gradient_norm=1.0, products=options.products, data_seed=0,
        checkpoint_steps=10**9, log_steps=10**9,
    )  # fmt: skip


def trainee(options, d_sae: int, k: int) -> Trainee:
    d = options.width
    variant = TopKSettings(k=k, k_aux=512, aux_coefficient=1 / 32)
    if options.variant == "standard":
        variant = ReluL1Settings(l1_coefficient=L1)
    scaled = Scaled([1.0], torch.ones(d), torch.zeros(d), [float(d)], [d])
    return Trainee(Wanted(variant, 0, Path("unused")), training(options, d_sae), scaled)


def batches_of(options, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(options.batch, options.width, generator=generator) for _ in range(count)]


def stepping(ours: Trainee, batches: list[torch.Tensor]):
    done = [3]  # the first step logs; a multiple of the batches, as the peer begins with the first of them

    def step() -> None:
        ours.step(batches[done[0] % len(batches)], done[0])
        done[0] += 1

    return step


def at_l0(ours: Trainee, batch: torch.Tensor, l0: int) -> None:
    """Lower the encoder's bias until so many features are active."""
    sae = ours.sae
    with torch.no_grad():
        pre = (batch[:256] @ sae.W_enc).flatten()
        sae.b_enc -= torch.topk(pre, 256 * l0).values.min()


def growth(options) -> None:
    """A table of ours alone."""
    for name, sizes in (("features", [4096, 8192, 16_384, 24_576, 49_152, 98_304]), ("k", [16, 32, 64, 128, 256])):
        for size in sizes:
            d_sae, k = (size, options.k) if name == "features" else (options.features, size)
            step = stepping(trainee(options, d_sae, k), batches_of(options))
            times = in_turn({f"{name} {size}": step}, options.rounds)
            table(times, options.batch, "tokens")


def versus(options, folder: Path) -> None:
    ours, batches = trainee(options, options.features, options.k), batches_of(options)
    if options.variant == "standard":
        at_l0(ours, batches[0], options.l0)
    tensors = {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in ours.sae.named_parameters()}
    tensors |= {f"x.{n}": batch for n, batch in enumerate(batches)}
    save_file(tensors, folder / "tensors.safetensors")
    job = PEERS[options.peer] | {
        "variant": options.variant, "d_in": options.width, "d_sae": options.features, "batch": options.batch,
        "k": options.k, "l1_coefficient": L1, "threads": options.threads, "encoded": ENCODED,
        "tensors": str(folder / "tensors.safetensors"),
    }  # fmt: skip
    peer = Peer("sae_training", job, options.python)
    name = f"ours, {options.products}"

    def encode() -> None:
        for number in range(ENCODED // options.batch):
            ours.sae.encode_sparse(batches[number % len(batches)])

    what = "encode" if options.encode else "step"
    ways = {name: encode if options.encode else stepping(ours, batches), options.peer: lambda: peer.ask(what)}
    times = in_turn(ways, options.rounds)
    table(times, ENCODED if options.encode else options.batch, "tokens")
    if what == "step":
        weights = sum(p.numel() for p in ours.sae.parameters()) * 4 / 2**20
        peak = 4 * weights + peak_memory(ways[name])  # weights, two moments and gradients are there before the step
        share = peak / (3 * weights)
        print(f"peak memory: {peak:.0f} MiB, {share:.2f} times weights and optimiser ({3 * weights:.0f} MiB)")
    peer.close()
    print(f"ratio={ratio(times, name, options.peer):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"width": 768, "features": 24_576, "batch": 4096, "k": 50, "l0": 150, "threads": 2, "rounds": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--variant", choices=["topk", "standard"], default="topk")
    parser.add_argument("--peer", choices=list(PEERS), default="sae_lens")
    parser.add_argument("--products", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--python", type=Path, default=ENVIRONMENT / "bin" / "python", help="the peers' interpreter")
    parser.add_argument("--encode", action="store_true")
    parser.add_argument("--growth", action="store_true")
    options = parser.parse_args()
    use_threads(options.threads)
    if options.growth:
        growth(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        versus(options, Path(folder))


if __name__ == "__main__":
    main()
