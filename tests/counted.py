"""Folders of programs that no planner made: the one of `handwritten_programs/counted`, with storage, segments and sizes changed at will.

Beside the program lie the `plan.json` and `fingerprint.json` that a dry run and a rehearsal read, with predictions that the test gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

SOURCE = Path(__file__).parent / "handwritten_programs" / "counted" / "program.py"
D, F, V, E, LAYERS = 64, 128, 100, 8, 2  # hidden, MLP, vocabulary, head size
BLOCK_NUMEL = (4 * D * D + 2 * D * F) // 2  # of one rank of tp
ROOT_NUMEL = 2 * V * D
KEEP = {"checkpoint(self.mlp, x, use_reentrant=False)": "self.mlp(x)"}


def write_counted(
    folder: Path,
    *,
    zero: int = 3,
    accumulation: int = 1,
    dp: int = 1,
    precision: str = "bf16",
    tokens: int = 256,
    edits: Mapping[str, str] | None = None,
    **predicted: Any,
) -> Path:
    """Write the program with replacements, and what lies beside it; `predicted` goes into `plan.json`. Returns the folder."""
    text = SOURCE.read_text()
    for old, new in {"ZERO = 3": f"ZERO = {zero}", "8, 256  #": f"8, {tokens}  #", **(edits or {})}.items():
        assert old in text, old
        text = text.replace(old, new)
    plan = {
        "mesh": {"sp": 2, "tp": 2},
        "dp": dp,
        "grad_accumulation_steps": accumulation,
        "hardware": "cpu",
        "peak_memory_gib": {"total": 1.0},
        "memory_limit_gib": 2.0,
        "time_s": {"forward": 1.0, "backward": 2.0, "recompute": 0.5, "reshard": 9.0, "optimizer": 0.25},
        "comm_bytes": {},
        **predicted,
    }
    mark = {"request": {"precision": precision}, "config": LlamaConfig(vocab_size=V).to_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.py").write_text(text)
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "fingerprint.json").write_text(json.dumps(mark, default=str))
    return folder
