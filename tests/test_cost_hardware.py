"""Hardware descriptions: the shipped files, the lookup by name or path, and every way a user's file can be wrong."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqloom.cost.hardware import GIB, hardware_names, load_hardware, parse_hardware, to_json
from seqloom.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["a100-80gb", "b200-180gb", "cpu", "h100-80gb", "h200-141gb"]


def description() -> dict:
    return json.loads(to_json(load_hardware("h100-80gb")))


def rejected(data: object) -> str:
    with pytest.raises(UserError) as caught:
        parse_hardware(json.dumps(data), "mine.json")
    message = str(caught.value)
    assert message.startswith("mine.json") and "\n" not in message
    return message


def test_names():
    assert hardware_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shipped_files_load_and_round_trip(name):
    hardware = load_hardware(name)
    assert hardware.name == name
    assert parse_hardware(to_json(hardware), "copy") == hardware
    assert hardware.sources
    assert 0 < hardware.usable_bytes < hardware.memory_bytes
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert hardware.peak(dtype) > 0


def test_figures_of_h100():
    hardware = load_hardware("h100-80gb")
    assert hardware.peak(torch.bfloat16) == 989e12
    assert hardware.memory_bandwidth == 3.35e12
    assert 79.0 < hardware.memory_bytes / GIB < 79.65
    assert hardware.usable_bytes / GIB < 74.0
    assert [link.ranks_per_group for link in hardware.links][0] == 8
    assert 320e9 <= hardware.links[0].bandwidth_bytes_per_s <= 360e9
    for kernel, forward, backward in (("cudnn", 600, 515), ("flash3", 680, 587), ("flex", 391, 271), ("flash2", 366, 330)):
        rates = hardware.rates.attention[kernel]
        assert rates.forward * 989 == pytest.approx(forward, rel=1e-3)
        assert rates.backward * 989 == pytest.approx(backward, rel=1e-3)
    assert next(iter(hardware.rates.attention)) == "cudnn"
    assert hardware.rates.matmul[-1][1] * 989 == pytest.approx(700, rel=1e-3)


def test_h200_has_the_arithmetic_of_h100_and_more_memory():
    h100, h200 = load_hardware("h100-80gb"), load_hardware("h200-141gb")
    assert h100.peak_flops == h200.peak_flops
    assert h100.rates == h200.rates
    assert h200.memory_bytes > h100.memory_bytes
    assert h200.memory_bandwidth == 4.8e12


def test_loads_from_a_file_given_as_text_or_path(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(to_json(load_hardware("cpu")))
    assert load_hardware(str(path)) == load_hardware("cpu") == load_hardware(path)


def test_loads_from_a_file_without_suffix_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "mymachine").write_text(to_json(load_hardware("cpu")))
    monkeypatch.chdir(tmp_path)
    assert load_hardware("mymachine").name == "cpu"


def test_loads_by_name_from_any_folder(tmp_path):
    """A folder of the user's that is called `configs` does not hide the shipped descriptions."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")
    code = f"import sys; sys.path.append({str(ROOT)!r}); from seqloom.cost.hardware import load_hardware; print(load_hardware('cpu').name)"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert out.stdout == "cpu\n", out.stderr


@pytest.mark.parametrize(("wrong", "near"), [("h100", "h100-80gb"), ("H200-141GB", "h200-141gb"), ("a100_80gb", "a100-80gb")])
def test_unknown_name_shows_the_nearest(wrong, near):
    with pytest.raises(UserError, match=near):
        load_hardware(wrong)


def test_unknown_name_without_a_near_one_lists_all():
    with pytest.raises(UserError, match="a100-80gb.*cpu.*h100-80gb"):
        load_hardware("zzzzzzzzzzzz")


@pytest.mark.parametrize("path", ["nowhere.json", "some/where"])
def test_missing_file_is_named(path):
    with pytest.raises(UserError, match=f"{path} does not exist"):
        load_hardware(path)


def test_folder_is_not_a_description(tmp_path):
    with pytest.raises(UserError, match="does not exist: give an existing JSON file"):
        load_hardware(tmp_path)


def test_binary_file(tmp_path):
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_hardware(path)


def test_broken_json_names_the_line():
    with pytest.raises(UserError, match=r"mine.json is not valid JSON \(line 2"):
        parse_hardware('{"name": "x",\n oops}', "mine.json")


@pytest.mark.parametrize("data", [[], 3, "text", None])
def test_not_an_object(data):
    assert "must be a JSON object" in rejected(data)


def test_host_memory_that_is_not_described_is_not_used():
    data = description()
    del data["host_memory_bytes"]
    assert parse_hardware(json.dumps(data), "mine.json").host_memory_bytes == 0


@pytest.mark.parametrize("field", sorted(set(description()) - {"host_memory_bytes"}))
def test_missing_field(field):
    data = description()
    del data[field]
    assert f"lacks the field {field}" in rejected(data)


def test_unknown_field_shows_the_nearest():
    data = description()
    data["memory_bandwith"] = 1.0
    assert "unknown field `memory_bandwith`: did you mean `memory_bandwidth`?" in rejected(data)


def test_unknown_field_without_a_near_one_lists_all():
    data = description()
    data["zzz"] = 1.0
    assert "the fields are name, memory_bytes" in rejected(data)


@pytest.mark.parametrize("field", ["memory_bytes", "memory_bandwidth", "host_link_bandwidth", "launch_overhead_s", "allocator_margin"])
@pytest.mark.parametrize("value", [-1, "80", True, None, math.nan, math.inf, [1]])
def test_impossible_numbers(field, value):
    data = description()
    data[field] = value
    assert f"{field} must be a number" in rejected(data)


@pytest.mark.parametrize("field", ["memory_bytes", "memory_bandwidth", "host_link_bandwidth"])
def test_zero_where_it_would_divide(field):
    data = description()
    data[field] = 0
    assert f"{field} must be a number above 0, not 0" in rejected(data)


def test_margin_below_one():
    data = description()
    data["allocator_margin"] = 1.0
    assert "allocator_margin must be a number of at least 0 and under 1" in rejected(data)


def test_whole_numbers():
    data = description()
    data["memory_bytes"] = 1.5
    assert "memory_bytes must be a whole number" in rejected(data)


def test_links_are_checked_with_their_place():
    data = description()
    data["links"][1]["latency_s"] = -1e-6
    assert "mine.json: links[1]: latency_s must be" in rejected(data)
    data = description()
    data["links"][0]["latency"] = data["links"][0].pop("latency_s")
    assert "links[0] has an unknown field `latency`: did you mean `latency_s`?" in rejected(data)
    data = description()
    data["links"].reverse()
    assert "from the inner to the outer" in rejected(data)
    data = description()
    data["links"] = []
    assert "links must be a list with at least one entry" in rejected(data)


def test_rates_are_checked_with_their_place():
    data = description()
    data["rates"]["attention"]["cudnn"]["forward"] = 600e12
    assert "mine.json: rates: attention: cudnn: forward must be a fraction of the peak" in rejected(data)
    data = description()
    data["rates"]["attention"] = {}
    assert "attention must have at least one entry" in rejected(data)
    data = description()
    del data["rates"]["collectives"]["all_to_all"]
    assert "collectives lacks the field all_to_all" in rejected(data)
    data = description()
    data["rates"]["pointwise"] = 0
    assert "pointwise must be a number above 0" in rejected(data)


@pytest.mark.parametrize("points", [[[128, 0.5], [64, 0.6]], [[64, 0.5], [128, 0.4]], [[64, 0.1], [128, 0.3]], [[64, 0.5], [64, 0.5]]])
def test_matmul_points_out_of_order(points):
    data = description()
    data["rates"]["matmul"] = points
    assert "out of order" in rejected(data)


@pytest.mark.parametrize("pair", [3, [1], [1, 0.5, 2], {"64": 0.5}])
def test_matmul_points_are_pairs(pair):
    data = description()
    data["rates"]["matmul"] = [pair]
    assert "matmul[0] must be [smallest dimension, fraction of peak]" in rejected(data)


def test_texts():
    for field, value in (("name", ""), ("name", 3)):
        data = description()
        data[field] = value
        assert "name must be a text" in rejected(data)
    data = description()
    data["sources"] = ["good", 1]
    assert "sources must be a list of texts" in rejected(data)


def test_peak_flops_names_are_dtypes():
    data = description()
    data["peak_flops"]["bf16"] = 1e12
    assert "`bf16`, which is no PyTorch dtype" in rejected(data)
    data["peak_flops"] = {}
    assert "peak_flops must have at least one entry" in rejected(data)


def test_dtype_without_a_peak():
    with pytest.raises(UserError, match="hardware `cpu` gives no peak_flops for float16 .it has float32"):
        load_hardware("cpu").peak(torch.float16)


def test_with_memory_gib():
    hardware = load_hardware("h100-80gb").with_memory_gib(24)
    assert hardware.memory_bytes == 24 * GIB
    assert hardware.usable_bytes == int(24 * GIB * (1 - hardware.allocator_margin))
    assert hardware.links == load_hardware("h100-80gb").links


@pytest.mark.parametrize("gib", [0, -1, math.nan, math.inf])
def test_with_impossible_memory(gib):
    with pytest.raises(UserError, match="GiB above 0"):
        load_hardware("cpu").with_memory_gib(gib)


def test_rates_by_dtype_stand_beside_the_common_ones():
    data = description()
    data["rates"]["by_dtype"] = {
        "float32": {"matmul": [[64, 0.5], [128, 0.9]], "attention": {"efficient": {"forward": 0.3, "backward": 0.2}}}
    }
    hardware = parse_hardware(json.dumps(data), "mine.json")
    assert hardware.rates.arithmetic(torch.float32).matmul == ((64, 0.5), (128, 0.9))
    assert list(hardware.rates.arithmetic(torch.float32).attention) == ["efficient"]
    assert hardware.rates.arithmetic(torch.bfloat16) == load_hardware("h100-80gb").rates.arithmetic(torch.float32)
    assert parse_hardware(to_json(hardware), "copy") == hardware


def test_rates_by_dtype_are_checked_with_their_place():
    data = description()
    data["rates"]["by_dtype"] = {"bf16": {"matmul": [[64, 0.5]], "attention": {"x": {"forward": 0.3, "backward": 0.2}}}}
    assert "rates: by_dtype has `bf16`, which is no PyTorch dtype" in rejected(data)
    data["rates"]["by_dtype"] = {"float32": {"matmul": [[64, 0.5]]}}
    assert "by_dtype: float32 lacks the field attention" in rejected(data)
    data["rates"]["by_dtype"] = 3
    assert "by_dtype must be a JSON object" in rejected(data)


def test_fusion_and_overlap_may_be_left_out():
    data = description()
    del data["rates"]["fused"], data["rates"]["overlap"], data["rates"]["by_dtype"]
    rates = parse_hardware(json.dumps(data), "mine.json").rates
    assert (rates.fused, rates.overlap, rates.by_dtype) == (True, 1.0, {})


@pytest.mark.parametrize("value", [-0.1, 1.5, "much", True])
def test_impossible_overlap(value):
    data = description()
    data["rates"]["overlap"] = value
    assert "rates: overlap must be" in rejected(data)


def test_overlap_may_be_nothing():
    data = description()
    data["rates"]["overlap"] = 0
    assert parse_hardware(json.dumps(data), "mine.json").rates.overlap == 0


@pytest.mark.parametrize("value", [1, "yes", None])
def test_fused_is_true_or_false(value):
    data = description()
    data["rates"]["fused"] = value
    assert "rates: fused must be true or false" in rejected(data)


def test_with_attention_kernel():
    hardware = parse_hardware(json.dumps(description()), "mine.json").with_attention_kernel("flash3")
    assert next(iter(hardware.rates.attention)) == "flash3"
    assert dict(hardware.rates.attention) == dict(load_hardware("h100-80gb").rates.attention)
    with pytest.raises(UserError, match="no rates for attention kernel `flash9`: it has flash3, cudnn"):
        hardware.with_attention_kernel("flash9")


def test_with_attention_kernel_holds_for_every_dtype_that_has_it():
    data = description()
    kernels = {"cudnn": {"forward": 0.1, "backward": 0.1}, "flash2": {"forward": 0.3, "backward": 0.2}}
    data["rates"]["by_dtype"] = {
        "float16": {"matmul": [[64, 0.5]], "attention": kernels},
        "float32": {"matmul": [[64, 0.5]], "attention": {"efficient": kernels["cudnn"]}},
    }
    hardware = parse_hardware(json.dumps(data), "mine.json").with_attention_kernel("flash2")
    assert [next(iter(hardware.rates.arithmetic(d).attention)) for d in (torch.bfloat16, torch.float16)] == ["flash2", "flash2"]
    assert list(hardware.rates.arithmetic(torch.float32).attention) == ["efficient"]
