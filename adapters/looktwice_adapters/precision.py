"""bfloat16 where the machine has it: a processor without its instructions is faster in float32."""

import torch

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # of x86, x86, ARM


def has_bfloat16(device_type: str) -> bool:
    """Whether matrix products in bfloat16 are fast on a kind of device ("cpu", "cuda", ...)."""
    known = torch.cpu.get_capabilities()
    return device_type != "cpu" or any(known.get(name, False) for name in INSTRUCTIONS)


def mixed_precision(device_type: str) -> torch.autocast:
    """Compute in bfloat16 where that is precise enough, and fast on this kind of device."""
    return torch.autocast(device_type, torch.bfloat16, enabled=has_bfloat16(device_type))
