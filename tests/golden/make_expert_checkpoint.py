"""Write a checkpoint in the released Anomaly-OV expert format, with reproducible values.

The names and shapes are those of the public `pretrained_expert_{05b,7b}.pth` files; the values are
drawn here, so that a converter and the maths behind it can be tested without the real weights.
`expert_outputs.npz` beside this script holds what the published reference implementation returns
for these values (float32, CPU).

    python make_expert_checkpoint.py expert.pth        # torch.save of {name: tensor}
"""

import sys

import torch

HIDDEN, EMBED, PATCHES = 1152, 512, 729
# Drawn weights alone give near-uniform attention, flat maps and scores near 0.5: errors would hide.
SHARPEN = {"q_former.query_proj.weight": 30.0, "final_predictor.2.weight": 40.0}


def shapes() -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, in file order."""
    table = {
        "positive_embedding": (1, EMBED),
        "negative_embedding": (1, EMBED),
        "pooling_layer.0.weight": (1, PATCHES),
        "pooling_layer.0.bias": (1,),
        "class_predictor.0.weight": (EMBED, HIDDEN),
        "class_predictor.0.bias": (EMBED,),
        "class_predictor.2.weight": (EMBED, EMBED),
        "class_predictor.2.bias": (EMBED,),
    }
    for i in range(4):
        table[f"siglip_adaptors.{i}.weight"] = (EMBED, HIDDEN)
        table[f"siglip_adaptors.{i}.bias"] = (EMBED,)
    for i in range(4):
        table[f"prompt_adaptors.{i}.weight"] = (EMBED, 2 * EMBED)
        table[f"prompt_adaptors.{i}.bias"] = (EMBED,)
    table |= {
        "final_predictor.0.weight": (512, HIDDEN),
        "final_predictor.0.bias": (512,),
        "final_predictor.2.weight": (1, 512),
        "final_predictor.2.bias": (1,),
        "q_former.query_proj.weight": (512, HIDDEN),
        "q_former.query_proj.bias": (512,),
        "q_former.key_proj.weight": (512, HIDDEN),
        "q_former.key_proj.bias": (512,),
    }
    return table


def checkpoint(seed: int = 7) -> dict[str, torch.Tensor]:
    """Reproducible values: N(0, 1/fan_in) matrices, N(0, 0.02^2) vectors."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in shapes().items():
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.02
        scale *= SHARPEN.get(name, 1.0)
        values[name] = torch.randn(shape, generator=generator) * scale
    return values


def features(split_sizes: list[int], seed: int = 11) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Inputs of the reference run: final features, four levels; each (crops, 729, 1152)."""
    generator = torch.Generator().manual_seed(seed)
    crops = sum(split_sizes)
    final = torch.randn(crops, PATCHES, HIDDEN, generator=generator)
    levels = [torch.randn(crops, PATCHES, HIDDEN, generator=generator) for _ in range(4)]
    return final, levels


if __name__ == "__main__":
    torch.save(checkpoint(), sys.argv[1] if len(sys.argv) > 1 else "expert.pth")
