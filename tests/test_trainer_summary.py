"""What is said before a run of its plan."""

from __future__ import annotations

from seqloom.trainer.summary import _modes, kernel_note


def plan(**segments: dict[str, object]) -> dict[str, object]:
    return {"segments": {"Block": segments}}


def test_every_mode_but_keeping_is_told_with_its_layers() -> None:
    mixed = {"keep": 11, "selective": 0, "recompute": 21, "spill": 0, "offload": 0, "tiles": 1, "kept": []}
    mlp = {"keep": 0, "selective": 30, "recompute": 0, "spill": 0, "offload": 2, "tiles": 1, "kept": ["gate_proj"]}
    kept = {"keep": 32, "selective": 0, "recompute": 0, "spill": 0, "offload": 0, "tiles": 1, "kept": []}
    assert (
        _modes(plan(attention_input=mixed, attention=kept, mlp=mlp)) == "attention_input recompute 21/32, mlp selective 30/32 offload 2/32"
    )
    assert _modes(plan(attention=kept)) == "activations kept"


def test_a_kernel_that_may_not_be_installed_is_told() -> None:
    assert kernel_note(None) is None
    assert "attention kernel flash3; where it is not installed the fastest that is there runs" in kernel_note("flash3")
