"""The same request gives the same bytes, in whichever process and in whatever order Python hashes its strings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CHANGING = {"timings.capture", "timings.plan", "timings.emit", "solver.seconds"}  # how long this compilation took
FILES = ("fingerprint.json", "plan.json", "program.py")
REQUESTS: dict[str, dict[str, Any]] = {
    "llama-free": {"model_id": "llama", "seq_len": 256, "plan_ngpus": 4, "runtime_ngpus": 8, "grad_accumulation_steps": 2},
    "llama-sp2,tp2": {"model_id": "llama", "seq_len": 256, "plan_ngpus": 4, "runtime_ngpus": 4, "force": "sp2,tp2", "recompute": "all"},
    "qwen3-tp2": {"model_id": "qwen3", "seq_len": 128, "plan_ngpus": 2, "runtime_ngpus": 2, "force": "tp2", "zero": 1, "hardware": "cpu"},
    "gpt2-free": {"model_id": "gpt2", "seq_len": 64, "micro_batch_size": 4, "plan_ngpus": 2, "runtime_ngpus": 2, "precision": "fp32"},
}
COMPILE = """
import json, sys
from pathlib import Path
from seqloom.emit.pipeline import compile_program
from seqloom.emit.request import CompileRequest
for name, request in json.loads(sys.argv[1]):
    compile_program(CompileRequest(**request, name=name, output_folder=Path("programs")))
print(hash("seqloom"))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of the same programs, compiled by two processes that hash strings differently, in opposite orders."""
    from parity_cases import CONFIGS

    places = [tmp_path_factory.mktemp(f"process{seed}") for seed in (1, 2)]
    processes = []
    for seed, place in enumerate(places, start=1):
        for model in ("llama", "qwen3", "gpt2"):
            CONFIGS[model]().save_pretrained(place / model)
        requests = list(REQUESTS.items())[:: 1 if seed == 1 else -1]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", COMPILE, json.dumps(requests)]
        processes.append(subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], results
    hashes = [out.split()[-1] for out, _ in results]
    assert hashes[0] != hashes[1], "both processes hash strings alike, so this shows nothing"
    return [place / "programs" for place in places]


@pytest.mark.parametrize("name", REQUESTS)
def test_program_and_fingerprint_are_byte_identical(name: str, compiled: list[Path]) -> None:
    first, second = (folder / name for folder in compiled)
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir()) == sorted(FILES)
    for file in ("program.py", "fingerprint.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


@pytest.mark.parametrize("name", REQUESTS)
def test_plan_is_byte_identical_but_for_the_time_it_took(name: str, compiled: list[Path]) -> None:
    texts = [(folder / name / "plan.json").read_text() for folder in compiled]
    documents = [json.loads(text) for text in texts]
    leaves = [dict(_leaves(document)) for document in documents]
    assert list(leaves[0]) == list(leaves[1]), "keys differ, or their order"
    assert set(leaves[0]) >= CHANGING
    assert {key for key in leaves[0] if leaves[0][key] != leaves[1][key]} <= CHANGING
    lines = [[line for line in text.splitlines() if not _is_time(line)] for text in texts]
    assert lines[0] == lines[1]


def _leaves(document: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every value of a JSON document with its path, in the document's order."""
    if isinstance(document, dict):
        return [leaf for key, value in document.items() for leaf in _leaves(value, f"{path}.{key}".lstrip("."))]
    if isinstance(document, list):
        return [leaf for index, value in enumerate(document) for leaf in _leaves(value, f"{path}[{index}]")]
    return [(path, document)]


def _is_time(line: str) -> bool:
    return line.strip().split(":")[0].strip('"') in {key.rpartition(".")[2] for key in CHANGING}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_program_names_no_place_and_no_time(name: str, compiled: list[Path]) -> None:
    """What is written must not depend on where or when it was."""
    for folder in compiled:
        text = (folder / name / "program.py").read_text()
        assert str(folder.parent) not in text and str(ROOT) not in text and " at 0x" not in text
