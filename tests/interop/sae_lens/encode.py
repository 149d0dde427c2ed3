"""What sae-lens makes of folders: python encode.py FOLDERS

For each FOLDERS/NAME, with `x` in FOLDERS/NAME.safetensors, it writes `codes`, `y_hat` to FOLDERS/NAME.out.safetensors,
whose own metadata has what sae-lens took for the folder's, as JSON. It imports nothing of the project, and runs in the
environment of requirements.lock.
"""

import json
import sys
from pathlib import Path

import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(folders: Path) -> None:
    for folder in sorted(path for path in folders.iterdir() if path.is_dir()):
        sae = SAE.load_from_disk(folder)
        x = load_file(f"{folder}.safetensors")["x"]
        tensors = {"codes": sae.encode(x), "y_hat": sae(x)}
        described = {"metadata": json.dumps(sae.cfg.metadata.to_dict())}
        save_file({name: t.contiguous() for name, t in tensors.items()}, f"{folder}.out.safetensors", described)


main(Path(sys.argv[1]))
