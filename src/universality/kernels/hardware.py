"""What the machine has instructions for."""

import torch


def has_bf16_products(device: str) -> bool:
    """Does `device` multiply bfloat16 matrices in hardware?"""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
