"""`python -m seqloom magi`: masks in words, the table and the picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seqloom.errors import UserError
from seqloom.magi import masks
from seqloom.magi.dispatch import plan_dispatch
from seqloom.magi.show import Layout, document_lengths, owners_of_cells, parse_mask, picture, planned, report

ROOT = Path(__file__).resolve().parents[1]


def test_masks_in_words(tmp_path: Path) -> None:
    lengths = tmp_path / "a:b.txt"  # a colon in the name
    lengths.write_text("4, 3\n5")
    assert parse_mask("causal", 8) == masks.packed([0, 8])
    assert parse_mask("full", 8) == masks.packed([0, 8], causal=False)
    assert parse_mask(f"packed:{lengths}", None) == masks.packed([0, 4, 7, 12])
    assert parse_mask("window:3", 8) == masks.sliding_window([0, 8], 3)
    assert parse_mask("window:3:1", 8) == masks.sliding_window([0, 8], 3, 1)
    assert parse_mask("global:2:3", 8) == masks.global_window([0, 8], 2, 3)
    assert parse_mask("blocks:4", 8) == masks.block_causal([0, 8], 4)
    lengths.write_text("[4, 3]")
    assert document_lengths(lengths) == [4, 3]


@pytest.mark.parametrize(
    ("text", "seq_len", "words"),
    [
        ("windw:3", 8, "--mask windw:3 is not a mask: give causal"),
        ("window", 8, "is not a mask"),
        ("window:-3", 8, "is not a mask"),
        ("causal", None, "needs the length of the sequence: give --seq_len"),
        ("packed:nowhere.txt", None, "cannot be read"),
    ],
)
def test_no_mask(text: str, seq_len: int | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_mask(text, seq_len)


@pytest.mark.parametrize("content", ["4 five", "", "[1.5]", "[0]", "[true]", "[4, ["])
def test_lengths_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "lengths").write_text(content)
    with pytest.raises(UserError, match="whole numbers"):
        document_lengths(tmp_path / "lengths")


def test_the_table_says_what_was_planned() -> None:
    mask, layout = masks.sliding_window([0, 4096], 512), Layout(8, 64)
    lines = list(report(mask, layout))
    exchange = planned(mask, layout)
    chosen = next(line for line in lines if line.startswith("chosen")).split()
    assert float(chosen[1]) == pytest.approx(exchange.dispatch.balance, abs=5e-4)
    assert int(chosen[2].replace(",", "")) == sum(exchange.received_rows)
    rows = [line.split() for line in lines[lines.index("", 4) + 2 :] if line[:1].isdigit()][:8]
    assert sum(int(row[2].replace(",", "")) for row in rows) == mask.area
    assert max(map(len, lines)) <= 120


def test_every_pixel_is_the_rank_of_its_query() -> None:
    mask = masks.packed([0, 40, 90])
    dispatch = plan_dispatch(mask, 4, 10)
    image = owners_of_cells(mask, dispatch, 90)  # a pixel for every cell
    allowed = mask.dense()
    assert np.array_equal(image >= 0, allowed)
    assert np.array_equal(image[allowed], np.broadcast_to(dispatch.owners[np.arange(90) // 10][:, None], (90, 90))[allowed])


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    mask = masks.packed([0, 40, 90])
    picture(mask, plan_dispatch(mask, 4, 10), tmp_path / "mask.png")
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot be written"):
        picture(mask, plan_dispatch(mask, 4, 10), tmp_path / "nowhere" / "mask.png")


def test_the_command_and_a_reader_that_leaves() -> None:
    words = f"{sys.executable} -m seqloom magi --mask causal --seq_len 16K --ranks 512 --hardware h100-80gb"
    done = subprocess.run(
        f"{words} | head -n 1; echo ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True
    )
    first, code = done.stdout.splitlines()
    assert first.startswith("mask      16,384 rows, 1 slices") and code in ("0", "141") and not done.stderr
