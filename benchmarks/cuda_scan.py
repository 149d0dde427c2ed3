"""The selective scan on a GPU: mamba-ssm's kernel, as models call it, against the plain recurrence, in turn.

    python benchmarks/cuda_scan.py --batch 4 --length 256 --width 1536 --state 16 --rounds 9

Prints a table of medians and, last, ratio=<median of the recurrence over the kernel>; a ratio below 5 is an error.
Where there is no GPU, or no mamba-ssm, it says so.
"""

import argparse
import importlib.util

import torch
from side_by_side import in_turn, ratio, table

from universality.kernels.selective_scan import selective_scan, selective_scan_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 4), ("length", 256), ("width", 1536), ("state", 16), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        return print("no CUDA device on this machine")
    if importlib.util.find_spec("mamba_ssm") is None:
        return print("the gpu extra (mamba-ssm) is not installed")
    torch.manual_seed(0)
    wide, narrow = (options.batch, options.length, options.width), (options.batch, options.length, options.state)
    u, step, B, C = (torch.randn(shape).cuda() for shape in (wide, wide, narrow, narrow))
    A, D = -torch.rand(options.width, options.state).cuda() * 8, torch.randn(options.width).cuda()
    values = (u, torch.nn.functional.softplus(step), A, B, C, D)

    def synchronised(scan):
        return lambda: (scan(*values), torch.cuda.synchronize())

    ways = {"kernel": synchronised(selective_scan), "plain recurrence": synchronised(selective_scan_reference)}
    times = in_turn(ways, options.rounds)
    table(times, options.batch * options.length, "tokens")
    found = ratio(times, "kernel", "plain recurrence")
    print(f"ratio={found:.2f}")
    if found < 5:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
