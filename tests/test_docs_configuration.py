"""docs/configuration.md has every flag of every program, as the programs have them.

After a change of a flag, `UPDATE_DOCS=1 python -m pytest tests/test_docs_configuration.py` writes the tables anew.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import yaml
from docs_flags import TABLE, TABLES, fill
from docs_pages import ROOT, blocks

from seqloom.cli import CHECKPOINT_COMMANDS, COMMANDS
from seqloom.trainer import settings_file
from seqloom.trainer.config import TrainConfig, parse

PAGE = ROOT / "docs" / "configuration.md"


def test_the_tables_are_those_of_the_programs():
    text = PAGE.read_text()
    if os.environ.get("UPDATE_DOCS"):
        text = fill(text)
        PAGE.write_text(text)
    assert fill(text) == text


def test_every_program_has_a_table():
    assert {found[1] for found in TABLE.finditer(PAGE.read_text())} == set(TABLES)
    assert set(COMMANDS) <= {*TABLES, "checkpoint"}
    assert all(f"checkpoint {name}" in PAGE.read_text() for name in CHECKPOINT_COMMANDS)


def test_every_setting_of_train_is_in_one_of_the_tables():
    parts = ("train.py", "compile", "optimizer", "output", "evaluation", "faults", "monitor")
    listed = [f.name for part in parts for f in dataclasses.fields(TABLES[part]) if not dataclasses.is_dataclass(f.default_factory)]
    listed.remove("compile")  # a part without a default
    assert sorted(listed) == sorted(settings_file.settings_of(TrainConfig))


@pytest.mark.parametrize("block", [b for b in blocks(PAGE) if b.language in ("yaml", "toml")], ids=lambda block: block.name)
def test_files_of_settings_are_read(block, tmp_path):
    path = tmp_path / f"run.{block.language}"
    path.write_text(block.text)
    config = parse(TrainConfig, "train.py", ["--config", str(path), "--lr", "2e-3"])
    assert config.optimizer.lr == 2e-3
    assert config.compile.model_id == "./mini"
    assert settings_file.resolved(config)["compile"]["plan_ngpus"] == 2


def test_both_files_of_settings_say_the_same(tmp_path):
    read = []
    for block in (b for b in blocks(PAGE) if b.language in ("yaml", "toml")):
        path = tmp_path / f"run.{block.language}"
        path.write_text(block.text)
        read.append(yaml.safe_dump(settings_file.resolved(parse(TrainConfig, "train.py", ["--config", str(path)]))))
    assert len(read) == 2 and read[0] == read[1]
