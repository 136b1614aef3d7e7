"""plan.html as a document: well-formed, whole, self-contained, deterministic, accessible; escaping; what happens when fields are absent."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from html_check import Page
from plan_page_samples import (
    compiled_program,
    dry_run,
    full_plan,
    full_program,
    plan_as_compiled,
    rehearsal,
    write,
    write_run,
)

from seqloom import cli
from seqloom.errors import UserError
from seqloom.report.plan_page import write_plan_page

ALL_SECTIONS = ["binding", "blocks", "memory", "time", "communication", "alternatives", "operators", "measured"]
COMPILED_SECTIONS = ["blocks", "memory", "time", "communication", "operators", "measured"]
OPTIONAL = (
    "alternatives",
    "binding",
    "advice",
    "timeline",
    "memory_timeline",
    "storage",
    "flops_per_rank",
    "host_memory_gib",
    "segments",
    "repeated",
    "solver",
    "timings",
    "zero",
    "dp",
    "micro_batch_size",
    "grad_accumulation_steps",
    "version",
)


def page_of(folder: Path) -> Page:
    return Page(write_plan_page(folder).read_text(encoding="utf-8"))


def page_with(tmp_path: Path, plan: dict) -> Page:
    """The page of a program whose plan is `plan`."""
    folder = compiled_program(tmp_path / "programs" / "p")
    write(folder, "plan.json", plan)
    return page_of(folder)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Page:
    return page_of(full_program(tmp_path_factory.mktemp("full")))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Page:
    return page_of(compiled_program(tmp_path_factory.mktemp("compiled") / "programs" / "p"))


def test_every_section_is_there(full):
    assert full.section_ids == ALL_SECTIONS


def test_right_after_a_compile_the_page_shows_what_there_is(compiled):
    assert compiled.section_ids == COMPILED_SECTIONS
    assert "dryrun --name p" in compiled.section("measured").text


@pytest.mark.parametrize("name", ["full", "compiled"])
def test_document_is_well_formed_and_titled(name, request):
    page = request.getfixturevalue(name)
    assert page.declarations == ["doctype html"]
    assert page.all("html")[0].attributes["lang"] == "en"
    assert "LlamaForCausalLM at 131,072 tokens" in page.all("title")[0].text
    assert {"viewport", "color-scheme"} <= {meta.attributes.get("name") for meta in page.all("meta")}
    ids = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["full", "compiled"])
def test_headings_descend_without_gaps(name, request):
    page = request.getfixturevalue(name)
    levels = [int(element.name[1]) for element in page.elements if re.fullmatch("h[1-6]", element.name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:], strict=False))
    assert all(page.section(id_).text for id_ in page.section_ids)


@pytest.mark.parametrize("name", ["full", "compiled"])
def test_every_drawing_says_what_it_shows_or_is_hidden(name, request):
    for svg in request.getfixturevalue(name).all("svg"):
        if "svg" in svg.ancestors:
            continue
        shown = svg.attributes.get("role") == "img" and svg.attributes.get("aria-label")
        assert shown or svg.attributes.get("aria-hidden") == "true", svg.attributes


def test_tables_have_headers_with_scopes(full):
    for header in full.all("th"):
        assert header.attributes.get("scope") in ("col", "rowgroup")


@pytest.mark.parametrize("name", ["full", "compiled"])
def test_nothing_is_fetched(name, request):
    page = request.getfixturevalue(name)
    for element in page.elements:
        assert element.name not in ("img", "iframe", "object", "embed", "video", "audio", "use", "image", "form")
        assert not {"src", "srcset", "xlink:href", "action", "style"} & set(element.attributes)
        assert element.attributes.get("href", "data:,") == "data:,"
        assert not any(attribute.startswith("on") for attribute in element.attributes)
    for code in [*page.all("style"), *page.all("script")]:
        assert not re.search(r"url\(|@import|https?:|fetch|XMLHttpRequest|import\(", code.text)
    policy = next(meta for meta in page.all("meta") if meta.attributes.get("http-equiv"))
    assert policy.attributes["content"].startswith("default-src 'none'")


def test_same_files_give_the_same_bytes(tmp_path):
    one, two = full_program(tmp_path / "a"), full_program(tmp_path / "b")
    assert write_plan_page(one).read_bytes() == write_plan_page(two).read_bytes() == write_plan_page(one).read_bytes()


def test_seconds_of_the_compile_do_not_matter(tmp_path):
    plan = full_plan()
    first = page_with(tmp_path / "a", plan).text
    plan["timings"] = {"capture": 99.0}
    plan["solver"] |= {"seconds": 123.0}
    assert page_with(tmp_path / "b", plan).text == first


def test_the_page_is_small(tmp_path):
    assert write_plan_page(full_program(tmp_path)).stat().st_size < 250_000


def test_header_tells_model_machine_and_prediction(full):
    header = full.all("header")[0].text
    for text in ("8 \u00d7 h100-80gb", "21.1 s", "5.27 s a micro-batch", "3,110", "46.6%", "79.0% counting full attention"):
        assert text in header
    assert "65.7 GiB" in header and "of 74.0 GiB usable" in header
    assert "524,288 tokens" in header and "mesh sp 8" in header and "storage ZeRO 3 over sp" in header
    assert "32 layers, 4,096 wide, 32 query heads, 8 key/value heads" in header and "12.5 GiB a rank, offloaded" in header


def test_scale_units_count_in_tokens_ranks_and_mesh(tmp_path):
    header = page_with(tmp_path, plan_as_compiled() | {"dp": 4}).all("header")[0].text
    assert "32 \u00d7 h100-80gb" in header and "4 scale units = 2,097,152 tokens" in header and "dp 4 \u00d7 sp 8" in header


def test_repeated_work_is_said(tmp_path):
    header = page_with(tmp_path, plan_as_compiled() | {"repeated": {"sp": 0.31}}).all("header")[0].text
    assert "31% of the compute runs whole on every rank of sp" in header


def test_copies_of_hybrid_storage_are_said(tmp_path):
    storage = {"zero": 3, "sharded": ["sp"], "replicated": ["dp"]}
    assert "ZeRO 3 over sp, a copy on each rank of dp" in page_with(tmp_path, plan_as_compiled() | {"storage": storage}).text


def test_what_binds_comes_first_and_advice_by_gain(full):
    text = full.section("binding").text
    assert text.startswith("What binds: compute") and "Arithmetic binds" in text
    assert text.index("twice the GPUs") < text.index("a quarter more memory")
    assert "11.1 s a step, 47.0% shorter" in text


def test_changes_that_make_it_worse_say_longer(tmp_path):
    advice = [{"change": "half the GPUs", "step_time_s": 42.0, "gain": -1.0, "sentence": "It still fits."}]
    text = page_with(tmp_path, plan_as_compiled() | {"advice": advice}).section("binding").text
    assert text.startswith("What would help") and "100.0% longer" in text


def test_every_operator_and_reshard_is_drawn_wide_and_narrow(full):
    drawings = [svg for svg in full.all("svg") if svg.classes & {"wide", "narrow"}]
    blocks = plan_as_compiled()["blocks"]
    assert len(drawings) == 2 * len(blocks)
    rows = [element for element in full.all("g") if "row" in element.classes]
    assert len(rows) == 2 * sum(map(len, blocks.values()))
    names = [row["operator"] for row in blocks["LlamaDecoderLayer"] if "operator" in row]
    for drawing in drawings[:2]:
        assert all(name in drawing.text for name in names)
        assert "all-to-all of query" in drawing.text and "S(2) \u2192 S(1)" in drawing.text and "h@sp" in drawing.text


def test_block_comes_before_what_lies_around_it(full):
    text = full.section("blocks").text
    assert text.index("LlamaDecoderLayer \u00d7 32") < text.index("Around the blocks")


def test_segments_say_how_many_layers_do_what(full):
    text = full.section("blocks").text
    assert "4 offloaded to the host, 28 kept" in text and "all 32 kept" in text
    wide = next(svg for svg in full.all("svg") if "wide" in svg.classes).text
    assert "16 recomputed in 8 tiles, 8 recomputed in part, 8 kept; gate proj and up proj saved" in wide


def test_cells_are_as_many_as_layers(full):
    for drawing in ("wide", "narrow"):
        cells = [e for e in full.elements if e.name == "rect" and e.attributes.get("height") == "8"]
        assert len(cells) == 2 * 4 * 32, drawing


def test_memory_against_the_limit(full):
    text = full.section("memory").text
    assert "65.7 GiB at the peak, 88.8% of what is usable; 8.27 GiB stay free" in text
    order = [text.index(part) for part in ("states 15.0", "gathered 1.96", "gradients 1.62", "activations 40.9", "working 6.24")]
    assert order == sorted(order)
    assert "limit 74.0 GiB" in text and "at backward layer 31" in text


def test_memory_that_does_not_fit_is_said(tmp_path):
    plan = plan_as_compiled() | {"memory_limit_gib": 40.0}
    assert "17.9 GiB too much" in page_with(tmp_path, plan).section("memory").text


def test_memory_timeline_without_times(tmp_path):
    plan = full_plan()
    for point in plan["memory_timeline"]:
        del point["time_s"]
    text = page_with(tmp_path, plan).section("memory").text
    assert "at backward layer 31" in text


def test_parts_of_time_and_lanes(full):
    text = full.section("time").text
    assert "backward 14.2 s" in text and "4.1% of the arithmetic is recomputation" in text
    assert "compute 98.5% busy" in text and "exposed" in text and "host 4.6% busy, all behind compute" in text
    tips = [e.attributes["data-tip"] for e in full.all("rect") if e.attributes.get("data-tip", "").startswith("optimizer")]
    assert tips


def test_communication_by_kind_the_largest_first(full):
    text = full.section("communication").text
    assert "One rank sends 293 GB in a step" in text
    assert text.index("reduce scatter") < text.index("all gather") < text.index("all to all")
    assert "112 GB, 38.4%" in text


def test_no_communication_is_said(tmp_path):
    plan = plan_as_compiled() | {"comm_bytes": {}, "mesh": {}}
    page = page_with(tmp_path, plan)
    assert "send each other nothing" in page.section("communication").text
    assert "mesh one rank" in page.text


def test_alternatives_tell_why(full):
    text = full.section("alternatives").text
    order = ["sp 8, ZeRO 3 over sp", "sp 4 \u00d7 tp 2", "tp 8, ZeRO 0", "sp 8, ZeRO 1", "dp_shard 8"]
    assert [text.index(name) for name in order] == sorted(text.index(name) for name in order)
    assert "tensor parallelism adds 1.1 s of collectives a step" in text and "81.4 GiB" in text and "cannot run" in text


def test_alternatives_in_words_with_bounds(tmp_path):
    alternatives = [
        {"mesh": "2 tensor parallel x 4 data or sequence", "zero": None, "step_time_s": None, "reason": "8 heads are not enough"},
        {"mesh": "8 tensor parallel", "zero": 1, "step_time_s": 30.0, "exact": False, "reason": "it cannot be quicker"},
        {"mesh": "8 data or sequence", "zero": 3, "step_time_s": 21.1, "exact": True, "reason": ""},
    ]
    text = page_with(tmp_path, plan_as_compiled() | {"alternatives": alternatives}).section("alternatives").text
    assert "8 tensor parallel, ZeRO 1 at least 30.0 s it cannot be quicker" in text
    assert "2 tensor parallel x 4 data or sequence cannot run 8 heads are not enough" in text
    assert "8 data or sequence" not in text.replace("4 data or sequence", "")  # the chosen one is there once, as the plan


def test_runners_up_the_closest_first(full):
    text = full.section("operators").text
    assert text.index("input_layernorm: l@sp, not h@sp +4.00 ms") < text.index("attention_output: h@sp, not l@sp +400 ms")
    assert "Every operator in numbers" in text


def test_constants_stand_beside_their_operator(tmp_path):
    plan = full_plan()
    losses = next(row for row in plan["blocks"]["model"] if row.get("operator") == "losses")
    losses["constants"] = {"chunk_size": 4096}
    assert "losses (chunk_size 4096)" in page_with(tmp_path, plan).section("operators").text


def test_measured_beside_predicted(full):
    text = full.section("measured").text
    assert "Dry run, rank 1 of 2 ranks, the fullest peak memory 65.7 GiB 64.2 GiB 1.023" in text
    assert "Rehearsal of rank 0 on NVIDIA H100 80GB HBM3, median of 5 steps step 21.1 s 23.8 s 0.885" in text
    assert "Training, median of 200 steps step 21.1 s 23.0 s 0.917" in text
    assert "peak memory 65.7 GiB 66.2 GiB 0.992" in text and "2.02 at step 200" in text


@pytest.mark.parametrize("field", OPTIONAL)
def test_each_optional_field_may_be_absent(field, tmp_path):
    plan = full_plan()
    plan.pop(field, None)
    page = page_with(tmp_path, plan)
    assert set(COMPILED_SECTIONS) <= set(page.section_ids)


def test_all_optional_fields_may_be_absent_at_once(tmp_path):
    plan = {key: value for key, value in full_plan().items() if key not in OPTIONAL}
    folder = compiled_program(tmp_path / "programs" / "p")
    (folder / "fingerprint.json").unlink()
    write(folder, "plan.json", plan)
    page = page_of(folder)
    assert page.section_ids == COMPILED_SECTIONS
    assert "a model at 131,072 tokens" in page.all("h1")[0].text + page.text


@pytest.mark.parametrize("empty", [{"alternatives": []}, {"advice": []}, {"timeline": []}, {"memory_timeline": []}, {"binding": None}])
def test_empty_fields_are_as_good_as_absent(empty, tmp_path):
    assert set(COMPILED_SECTIONS) <= set(page_with(tmp_path, full_plan() | empty).section_ids)


@pytest.mark.parametrize("field", ["peak_memory_gib", "mesh", "blocks", "time_s"])
def test_a_plan_without_its_core_is_refused(field, tmp_path):
    plan = plan_as_compiled()
    del plan[field]
    with pytest.raises(UserError, match=f"`{field}`: compile the program again"):
        page_with(tmp_path, plan)


def test_no_plan_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no plan\.json .* compile a program"):
        write_plan_page(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["plan.json", "dryrun.json", "rehearsal.json", "fingerprint.json"])
@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_damaged_files_are_named(name, content, tmp_path):
    folder = full_program(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        write_plan_page(folder)


HOSTILE = "<script>alert(1)</script> & \"quotes\" 'too' </svg> ]]> <!-- {x}"


def hostile(value):
    """The document with every text that is not a number or a placement replaced."""
    if isinstance(value, dict):
        return {key: item if key in ("from", "to") else hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_texts_are_escaped_wherever_they_come_from(tmp_path):
    folder = full_program(tmp_path)
    for name in ("plan.json", "fingerprint.json", "dryrun.json", "rehearsal.json"):
        write(folder, name, hostile(json.loads((folder / name).read_text())))
    page = page_of(folder)
    assert len(page.all("script")) == 1
    for place in ("binding", "blocks", "memory", "time", "alternatives", "operators", "measured"):
        assert "<script>alert(1)</script>" in page.section(place).text
    assert any(element.attributes.get("data-tip", "") and HOSTILE in element.attributes["data-tip"] for element in page.elements)


def test_keys_are_escaped_too(tmp_path):
    plan = full_plan()
    plan["peak_memory_gib"][HOSTILE] = 1.0
    plan["time_s"][HOSTILE] = 1.0
    plan["comm_bytes"][HOSTILE] = 10**9
    plan["mesh"] = {HOSTILE: 8}
    plan["blocks"][HOSTILE] = copy.deepcopy(plan["blocks"]["model"])
    plan["segments"][HOSTILE] = {HOSTILE: {"keep": 1}}
    page = page_with(tmp_path, plan)
    assert len(page.all("script")) == 1
    for place in ("memory", "time", "communication", "blocks"):
        assert "<script>alert(1)</script>" in page.section(place).text


def test_a_program_named_like_markup(tmp_path):
    page = page_of(compiled_program(tmp_path / "programs" / "<b>&amp;"))
    assert page.all("h1")[0].text == "Plan <b>&amp;" and not page.all("b")[0].text.startswith("&")


def test_many_layers_and_many_axes(tmp_path):
    """A page of 126 layers on a mesh of three axes."""
    plan = full_plan()
    plan["mesh"] = {"node": 64, "sp": 4, "tp": 2}
    for modes in plan["segments"]["LlamaDecoderLayer"].values():
        modes["keep"] += 126 - sum(modes[mode] for mode in ("keep", "recompute", "selective", "offload"))
    for row in plan["blocks"]["LlamaDecoderLayer"]:
        if "reshard" in row:
            row |= {"from": "B S(1) P", "to": "B S(2) R"}
        else:
            row["strategy"] = {"node": "whole", "sp": "l", "tp": "h"}
    page = page_with(tmp_path, plan)
    wide = next(svg for svg in page.all("svg") if "wide" in svg.classes).text
    assert "whole on node l@sp h@tp" in wide and "all-to-all + all-reduce of query" in wide
    assert "LlamaDecoderLayer \u00d7 126" in page.text


def test_a_run_elsewhere_is_found_when_it_is_named(tmp_path):
    folder = compiled_program(tmp_path / "programs" / "p")
    write_run(tmp_path / "elsewhere", plan_as_compiled(), folder)
    assert "Training" not in page_of(folder).section("measured").text
    named = Page(write_plan_page(folder, tmp_path / "elsewhere").read_text(encoding="utf-8"))
    assert "Training, median of 200 steps" in named.section("measured").text


@pytest.mark.parametrize("present", ["dryrun", "rehearsal"])
def test_one_measurement_alone(present, tmp_path):
    folder = compiled_program(tmp_path / "programs" / "p")
    plan = full_plan()
    write(folder, f"{present}.json", {"dryrun": dry_run, "rehearsal": rehearsal}[present](plan))
    text = page_of(folder).section("measured").text
    assert ("Dry run" in text) == (present == "dryrun") and ("Rehearsal" in text) == (present == "rehearsal")


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "seqloom", *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_report_command_writes_the_page_and_imports_no_torch(tmp_path):
    folder = full_program(tmp_path)
    done = command("report", "--name", folder.name, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.split() == ["wrote", f".seqloom/{folder.name}/plan.html"], done.stderr
    assert "Training" in Page((folder / "plan.html").read_text(encoding="utf-8")).section("measured").text
    code = "import sys, seqloom.report.plan_page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], timeout=60).returncode == 0


def test_report_command_takes_the_folder_of_logs(tmp_path):
    folder = full_program(tmp_path)
    shutil.move(tmp_path / "runs", tmp_path / "logs")
    command("report", "--name", folder.name, "--log-dir", "logs", cwd=tmp_path)
    assert "Training" in Page((folder / "plan.html").read_text(encoding="utf-8")).section("measured").text


def test_report_command_without_a_program_says_how_to_get_one(tmp_path):
    done = command("report", "--name", "nothing", cwd=tmp_path)
    assert done.returncode == 2 and "compile --name nothing" in done.stderr and "Traceback" not in done.stderr


def test_compiling_writes_the_page(tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "vocab_size": 256, "head_dim": 16}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    done = command("compile", "--model_id", "./model", "--seq_len", "128", "--name", "small", "--hardware", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / ".seqloom" / "small" / "plan.html").read_text(encoding="utf-8"))
    assert set(COMPILED_SECTIONS) <= set(page.section_ids) and "LlamaForCausalLM at 128 tokens" in page.text


@pytest.mark.parametrize(("name", "measure", "title"), [("dryrun", dry_run, "Dry run"), ("rehearse", rehearsal, "Rehearsal")])
def test_measuring_writes_the_page_again(name, measure, title, tmp_path, monkeypatch):
    folder = compiled_program(tmp_path / "p")

    def run(where, *_):
        write(where, {"dryrun": "dryrun.json", "rehearse": "rehearsal.json"}[name], measure(full_plan()))
        return 3

    monkeypatch.setattr(f"seqloom.runtime.{name}.run", run)
    assert cli.COMMANDS[name](["--name", "p", "--output_folder", str(tmp_path)], "prog") == 3
    assert title in Page((folder / "plan.html").read_text(encoding="utf-8")).section("measured").text
