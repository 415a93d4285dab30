"""bfloat16 is used where the machine has it."""

import pytest
import torch

from looktwice_adapters.precision import has_bfloat16, mixed_precision


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [({"avx2": True}, False), ({"avx512_bf16": True}, True), ({"neon": True, "bf16": True}, True)],
)
def test_a_processor_without_the_instructions_computes_in_float32(monkeypatch, capabilities, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bfloat16("cpu") == has
    with mixed_precision("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if has else torch.float32)


def test_other_devices_are_taken_to_have_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert has_bfloat16("cuda")
