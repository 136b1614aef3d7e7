"""Segments: they cover a block in order, stand apart from attention, and hand over exactly what the later ones need."""

from __future__ import annotations

import keyword

import pytest
from plan_samples import Sketch, tiny

from seqloom.capture.documents import PLAIN
from seqloom.plan.clusters import clusters
from seqloom.plan.regions import Region
from seqloom.plan.segments import segments

BLOCKS = ["llama", "qwen3", "gpt2", "gemma2", "phi3", "gpt_neox"]


def blocks(family: str) -> list[Region]:
    found = [region for key, region in tiny(family, 2).parts.items() if key]
    assert found
    return found


@pytest.mark.parametrize("family", BLOCKS)
def test_segments_cover_the_block_in_order(family):
    for region in blocks(family):
        spans = [(s.start, s.stop) for s in region.segments]
        assert spans[0][0] == 0 and spans[-1][1] == len(region.parts)
        assert all(a < b for a, b in spans)
        assert all(left[1] == right[0] for left, right in zip(spans, spans[1:], strict=False))
        assert [region.segment_of(i) for i in range(len(region.parts))] == [
            index for index, (a, b) in enumerate(spans) for _ in range(a, b)
        ]


@pytest.mark.parametrize("family", BLOCKS)
def test_attention_is_never_recomputed_and_all_else_may_be(family):
    for region in blocks(family):
        for segment in region.segments:
            ops = [node.op for part in region.parts[segment.start : segment.stop] for node in part.nodes]
            assert segment.recomputable == (PLAIN not in ops)
        assert sum(segment.recomputable for segment in region.segments) >= 2
        assert sum(not segment.recomputable for segment in region.segments) == 1


@pytest.mark.parametrize("family", BLOCKS)
def test_what_crosses_a_border_is_named(family):
    """Running segment after segment with only the named inputs and outputs, every value is there when it is needed."""
    for region in blocks(family):
        kinds = ("parameter", "buffer")
        handed = set(region.graph.inputs)
        for segment in region.segments:
            assert set(segment.inputs) <= handed
            assert len(set(segment.inputs)) == len(segment.inputs)
            inside = set(segment.inputs)
            for part in region.parts[segment.start : segment.stop]:
                assert {n for n in part.inputs if region.graph.values[n].kind not in kinds} <= inside
                inside |= set(part.outputs)
            assert set(segment.outputs) <= inside - set(segment.inputs)
            handed |= set(segment.outputs)
        assert set(region.graph.outputs) <= handed
        later = {n for s in region.segments for n in s.inputs} | set(region.graph.outputs)
        assert all(set(segment.outputs) <= later for segment in region.segments)


@pytest.mark.parametrize("family", BLOCKS)
def test_names_become_methods(family):
    for region in blocks(family):
        names = [segment.name for segment in region.segments]
        assert len(set(names)) == len(names)
        assert all(name.isidentifier() and not keyword.iskeyword(name) for name in names)
        assert "attention" in names


def test_llama_has_the_four_segments_of_its_layer():
    (region,) = blocks("llama")
    assert [s.name for s in region.segments] == ["attention_input", "attention", "attention_output", "mlp"]
    by_name = {s.name: s for s in region.segments}
    assert set(by_name["attention"].inputs) == {"query", "key", "value"}
    assert by_name["mlp"].inputs == by_name["attention_output"].outputs


def test_a_residual_stream_is_cut_where_it_stands_alone():
    sketch = Sketch("Block")
    x = sketch.input("x", (2, 4, 8), grad=True)
    for name in ("one", "two"):
        x = sketch.op("aten.add.Tensor", x, sketch.linear(x, 8, name), module="")
    graph = sketch.graph(x)
    parts = clusters(graph)
    found = segments(graph, parts)
    assert [s.name for s in found] == ["one", "two"]
    assert [len(s.inputs) for s in found] == [1, 1] and found[-1].outputs == graph.outputs


def test_a_block_of_light_work_is_one_segment():
    sketch = Sketch("Block")
    x = sketch.input("x", (2, 4, 8), grad=True)
    graph = sketch.graph(sketch.op("aten.silu.default", x, module="act"))
    (only,) = segments(graph, clusters(graph))
    assert (only.start, only.stop, only.inputs, only.outputs, only.recomputable) == (0, 1, ("x",), graph.outputs, True)
