"""The benchmarks for one GPU run at toy size on CPUs, without `datasets`, `tyro` and `ruff`, which a lent machine may lack.

Every script runs once, in a process in which those packages cannot be imported, nor in the processes that it starts; then tests look at
its result. What decides a figure (ratios, verdicts, the search for the longest sequence) is tested on made-up figures.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from seqloom.cost.hardware import AttentionRate, load_hardware, parse_hardware, to_json

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"
FACTS = {"device", "memory_gib", "torch", "cuda", "triton", "transformers", "python", "date"}
BLOCK = """import importlib.metadata, sys
sys.modules.update(dict.fromkeys(("datasets", "tyro", "ruff")))
_version = importlib.metadata.version
def version(name):
    if name == "ruff":
        raise importlib.metadata.PackageNotFoundError(name)
    return _version(name)
importlib.metadata.version = version
"""  # as sitecustomize.py, which every Python process of the benchmark runs first


def script(name: str) -> ModuleType:
    for needed in ("workbench", "contenders", "meter", name):
        if needed not in sys.modules:
            spec = importlib.util.spec_from_file_location(needed, FOLDER / f"{needed}.py")
            sys.modules[needed] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`result(script, *flags)`: what a script at toy size writes; `printed` is what it printed."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(name: str, *flags: str) -> dict[str, Any]:
        out = folder / f"{name}{len(flags)}.json"
        command = [sys.executable, str(FOLDER / f"{name}.py"), "--device", "cpu", "--toy", "--out", str(out), *flags]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(out.read_text(encoding="utf-8"))
        assert found["machine"].keys() >= FACTS
        assert found["toy"]
        return {**found, "printed": done.stdout}

    return run


def test_kernels(result: Callable[..., dict[str, Any]]) -> None:
    found = result("kernels")
    assert found["ceilings"]["flops"] > 0 and found["ceilings"]["bytes_per_s"] > 0
    rows = {(row["kernel"], row["length"]): row for row in found["attention"]}
    assert {length for _, length in rows} == {64, 128}
    assert rows["seqloom", 128]["backward"].keys() == {"ms", "tflops", "share"}
    assert "needs an NVIDIA GPU" in rows["magi flash3", 64]["error"]
    assert all("both" in row for row in found["matmul"])
    heads = {row["head"]: row for row in found["loss_head"]}
    assert "share" in heads["chunk 16"]["both"] and "both" in heads["plain torch"]
    assert all("both" in row or "error" in row for row in heads.values())
    measured = {(row["operator"], row["how"]) for row in found["elementwise"] if "both" in row}
    assert measured >= {("norm", "torch"), *((name, how) for name in ("norm", "rotary", "swiglu") for how in ("eager", "compiled"))}
    others = {(row["operator"], row["how"]): row for row in found["elementwise"]}
    if importlib.util.find_spec("apex") is None:
        assert "apex" in others["norm", "apex"]["error"]
    assert {row["optimizer"] for row in found["optimizer"] if "step" in row} >= {"AdamW fused", "AdamW foreach"}
    assert "TFLOP/s" in found["printed"] and "AdamW foreach" in found["printed"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    assert not interleaved and x.shape[1] == cosine.shape[0] and x.shape[3] == 2 * cosine.shape[1]  # [b, l, h, e], [l, e / 2]
    left, right = x.chunk(2, -1)
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), -1)


PACKAGES = {
    "apex.normalization.fused_layer_norm": {"fused_rms_norm_affine": lambda x, weight, shape, eps: rms_norm(x, weight.view(shape), eps)},
    "flash_attn.ops.triton.layer_norm": {"rms_norm_fn": lambda x, weight, bias, residual=None, eps=1e-6: rms_norm(x, weight, eps)},
    "flash_attn.layers.rotary": {"apply_rotary_emb": rotated},
    "flash_attn.ops.activations": {"swiglu": lambda x, y: torch.nn.functional.silu(x) * y},
    "liger_kernel.transformers.functional": {
        "liger_rms_norm": lambda x, weight, eps, in_place=True: rms_norm(x, weight, eps),
        "liger_swiglu": lambda gate, up: torch.nn.functional.silu(gate) * up,
    },
}


def test_other_makers_kernels_are_given_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins that have the signatures of the packages."""
    for name, functions in PACKAGES.items():
        parts = name.split(".")
        for place in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:place]), ModuleType(".".join(parts[:place])))
        vars(sys.modules[name]).update(functions)
    part = script("kernels_elementwise")
    torch.manual_seed(0)
    angles = torch.randn(6, 4).repeat(1, 2)
    inputs = {
        "norm": (torch.randn(6, 16), torch.randn(16)),
        "rotary": (torch.randn(3, 6, 8), angles.cos(), angles.sin()),
        "swiglu": (torch.randn(6, 16), torch.randn(6, 16)),
    }
    for operator, makers in part.OTHERS.items():
        expected = part.OPERATORS[operator](*inputs[operator])
        for make in makers.values():
            torch.testing.assert_close(make()(*inputs[operator]), expected)


def test_hardware(result: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    found = result("hardware")
    figures = {row["figure"]: row for row in found["figures"]}
    assert figures["float32 matmul 16, TFLOPS"]["ratio"] > 0 and figures["float32 matmul 64, TFLOPS"]["described"] is None
    assert parse_hardware(json.dumps(found["hardware"]), "measured").name == found["name"] == "cpu"
    with pytest.raises(SystemExit, match="toy size"):
        script("hardware").apply(found, tmp_path)


def test_measured_rates_reach_the_descriptions(tmp_path: Path) -> None:
    """Of H200 and H100, which share their arithmetic units; what was not measured stays, behind what was."""
    for name in ("h100-80gb", "h200-141gb"):
        shutil.copy(ROOT / "configs" / "hardware" / f"{name}.json", tmp_path)
    before = {name: load_hardware(tmp_path / f"{name}.json") for name in ("h100-80gb", "h200-141gb")}
    measured = dataclasses.replace(
        before["h200-141gb"],
        launch_overhead_s=3e-6,
        host_link_bandwidth=4e10,
        rates=dataclasses.replace(
            before["h200-141gb"].rates,
            matmul=((16, 0.04), (8192, 0.8)),
            attention={"cudnn": AttentionRate(0.625, 0.5), "flash2": AttentionRate(0.375, 0.25), "math": AttentionRate(0.01, 0.01)},
            pointwise=0.9,
        ),
    )
    machine = {"device": "NVIDIA H200", "torch": "2.11.0", "date": "2026-11-22T12:00:00+00:00"}
    result = {"toy": False, "name": "h200-141gb", "machine": machine, "hardware": json.loads(to_json(measured))}
    files = script("hardware").apply(result, tmp_path)
    assert [file.stem for file in files] == ["h200-141gb", "h100-80gb"]
    script("hardware").apply(result, tmp_path)  # a second time changes nothing
    for name, was in before.items():
        now = load_hardware(tmp_path / f"{name}.json")
        assert (now.rates.matmul, now.rates.pointwise, now.launch_overhead_s) == (measured.rates.matmul, 0.9, 3e-6)
        assert list(now.rates.attention) == ["cudnn", "flash2", "math", "flash3", "flex"]
        assert now.rates.attention["cudnn"] == AttentionRate(0.625, 0.5) and now.rates.attention["flash3"] == was.rates.attention["flash3"]
        assert (now.peak_flops, now.memory_bandwidth, now.links, now.memory_bytes) == (
            was.peak_flops,
            was.memory_bandwidth,
            was.links,
            was.memory_bytes,
        )
        assert now.host_link_bandwidth == (4e10 if name == "h200-141gb" else was.host_link_bandwidth)
        (told,) = [line for line in now.sources if line.startswith("Measured rates")]
        assert "NVIDIA H200, PyTorch 2.11.0" in told and "as described before: flash3, flex" in told
        assert ("the same arithmetic units" in told) == (name == "h100-80gb")
        assert not any(line.startswith(("matmul:", "attention:", "pointwise:")) for line in now.sources)


def test_rehearsal(result: Callable[..., dict[str, Any]]) -> None:
    found = result("rehearse_8b_128k", "--steps", "2")
    assert found["ranks"].keys() == {"0", "1"}
    for rank in found["ranks"].values():
        assert rank["time_s"].keys() == rank["predicted"]["time_s"].keys() == {"forward", "backward", "optimizer"}
    assert found["verdicts"].keys() == {"compute_s", "time_apart", "peak_apart"}
    assert found["verdicts"]["peak_apart"]["found"] < 0.25
    assert found["plan"]["seq_len"] == 256 and "compute of a sequence" in found["printed"]


def test_head_to_head(result: Callable[..., dict[str, Any]]) -> None:
    found = result("head_to_head", "--contenders", "huggingface", "torchtitan", "seqloom_lean")
    (ones,) = found["lengths"].values()
    assert {"seqloom", "huggingface"} <= ones.keys()
    assert all(ones[name]["tokens_per_s"] > 0 and ones[name]["peak_gib"] > 0 for name in ("seqloom", "huggingface", "seqloom_lean"))
    assert ones["seqloom_lean"]["plan"]["memory_limit_gib"] == pytest.approx(0.95 * ones["huggingface"]["peak_gib"])
    assert ones["seqloom"]["loss"] == pytest.approx(ones["huggingface"]["loss"], rel=0.02)  # other weights, both at random
    if importlib.util.find_spec("torchtitan") is None:
        assert "torchtitan is not installed" in found["printed"]
    assert len(found["verdicts"]) == 2 * (len(ones) - 1)


def test_loss_curves(result: Callable[..., dict[str, Any]]) -> None:
    found = result("head_to_head", "--loss", "--steps", "3")
    assert {len(curve["losses"]) for curve in found["curves"].values()} == {3}
    assert found["apart"].keys() == {"seqloom", "second reference", "autocast"}
    assert found["apart"]["seqloom"]["largest"] < 1e-2


def test_longest(result: Callable[..., dict[str, Any]]) -> None:
    found = result("longest")["models"]["toy"]
    assert found["predicted"] == found["longest"] == 512
    assert "no plan" in found["tries"]["768"]["error"]
    assert found["tries"]["512"]["peak_gib"] <= script("longest").TOY_GIB


def test_all_goes_on_where_a_script_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    every = script("all")
    for name, text in {"bad": "raise SystemExit(3)", "slow": "import time; time.sleep(60)", "good": "print('figures')"}.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(every, "HERE", tmp_path)
    monkeypatch.setattr(every, "SCRIPTS", {name: (f"{name}.py",) for name in ("bad", "slow", "good")})
    monkeypatch.setattr(sys, "argv", ["all.py", "--only", "bad,slow,good", "--folder", str(tmp_path / "out"), "--limit_s", "2"])
    assert every.main() == 1
    assert (tmp_path / "out" / "good.log").read_text(encoding="utf-8") == "figures\n"
    told = [every.run(name, tmp_path, 2.0, False)[2] for name in every.SCRIPTS]
    assert told == ["failed with code 3", "ended after 2 s", "done"]


def test_every_script_is_in_all() -> None:
    named = {words[0] for words in script("all").SCRIPTS.values()}
    assert named == {path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")} - {"all.py"}


def test_a_try_that_fails_says_why(tmp_path: Path) -> None:
    workbench = script("workbench")
    child = tmp_path / "child.py"
    child.write_text(
        f"import sys, time; sys.path[:0] = [{str(FOLDER)!r}]\n"
        "from pathlib import Path\nimport torch\nfrom workbench import be_child\n"
        "from seqloom.errors import UserError\n"
        "def work(task):\n"
        "    if task['how'] == 'memory': raise torch.OutOfMemoryError('CUDA out of memory. Tried\\nmore')\n"
        "    if task['how'] == 'user': raise UserError('give more')\n"
        "    if task['how'] == 'crash': raise ValueError('broken')\n"
        "    time.sleep(60)\n"
        "be_child(Path(sys.argv[2]), work)\n",
        encoding="utf-8",
    )
    assert workbench.run_child(child, {"how": "memory"}, 60) == {"error": "out of memory", "detail": "CUDA out of memory. Tried"}
    assert workbench.run_child(child, {"how": "user"}, 60) == {"error": "give more"}
    assert workbench.run_child(child, {"how": "crash"}, 60)["error"] == "ValueError: broken"
    assert workbench.run_child(child, {"how": "sleep"}, 3)["error"] == "took more than 3 s"


@pytest.mark.parametrize(
    ("device", "memory_gib", "expected"),
    [
        ("NVIDIA H200", 139.8, "h200-141gb"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80gb"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80gb"),
        ("NVIDIA Something", 170.0, "b200-180gb"),
    ],
)
def test_the_description_is_that_of_the_device(device: str, memory_gib: float, expected: str) -> None:
    assert script("workbench").nearest(device, memory_gib, "cuda") == expected
    assert script("workbench").nearest(device, memory_gib, "cpu") == "cpu"


def test_verdicts_of_speed_are_for_what_both_could_run() -> None:
    own = {"tokens_per_s": 30.0, "peak_gib": 2.0, "step_s": 1.0}
    other = {"tokens_per_s": 10.0, "peak_gib": 1.0, "step_s": 3.0}
    lengths = {"8": {"seqloom": own, "huggingface": other}, "16": {"seqloom": own, "huggingface": {"error": "out of memory"}}}
    found = script("head_to_head").verdicts(lengths)
    assert [(verdict["found"], verdict["met"]) for verdict in found] == [(3.0, True), (2.0, False)]
    assert "out of memory" in script("head_to_head").speed_table(lengths)


def test_differences_of_curves_are_relative_to_the_reference() -> None:
    curves = {"reference": {"losses": [4.0, 2.0]}, "seqloom": {"losses": [4.0, 2.1]}, "autocast": {"error": "out of memory"}}
    found = script("head_to_head").differences(curves)
    assert found == {"seqloom": {"largest": pytest.approx(0.05), "mean": pytest.approx(0.025)}}


def test_verdicts_of_a_rehearsal_are_for_the_worse_rank() -> None:
    def rank(step_s: float, peak_gib: float) -> dict[str, Any]:
        return {"step_s": step_s, "peak_gib": peak_gib, "predicted": {"step_s": 4.5, "peak_gib": 72.0}}

    found = script("rehearse_8b_128k").verdicts({"ranks": {"0": rank(4.5, 72.0), "7": rank(5.0, 60.0)}})
    assert [found[name]["met"] for name in ("compute_s", "time_apart", "peak_apart")] == [False, True, False]
    nothing = script("rehearse_8b_128k").verdicts({"ranks": {"7": {"error": "out of memory"}}})
    assert {verdict["met"] for verdict in nothing.values()} == {None}


def test_lengths_go_outward_from_the_prediction() -> None:
    longest = script("longest")
    assert longest.outward(512, 2, longer=True)[:2] == [768, 1024]
    assert longest.outward(512, 2, longer=False)[:2] == [384, 256]
    assert longest.outward(768, 2, longer=True)[0] == 1024


def test_attention_in_pieces_makes_the_same_tensors() -> None:
    from seqloom.ops.attention import attention

    query, key, value = (torch.randn(1, 12, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    found = script("longest").within_pieces(attention, 4)(query, key, value, scale=0.3, causal=True)
    cut = [attention(*(x[:, :, i : i + 4] for x in (query, key, value)), scale=0.3) for i in (0, 4, 8)]
    torch.testing.assert_close(found, torch.cat(cut, 2))
    assert found.shape == query.shape and found.requires_grad


def test_a_text_that_can_be_learned_is_the_same_for_all() -> None:
    contenders = script("contenders")
    rows = contenders.chain_of_tokens(512, 64, 3)
    assert torch.equal(rows["input_ids"], contenders.chain_of_tokens(512, 64, 3)["input_ids"])
    assert torch.equal(rows["labels"][:, :-1], rows["input_ids"][:, 1:])
