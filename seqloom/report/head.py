"""The top of the page: what was planned, for which machine, and the four figures that matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from seqloom.report.documents import Documents
from seqloom.report.markup import Child, Markup, tag
from seqloom.report.text import gib, mesh_text, number, percent, plural, seconds, storage_text

_SIZES = (
    (("num_hidden_layers", "n_layer"), "layer", "layers"),
    (("hidden_size", "n_embd"), "wide", "wide"),
    (("num_attention_heads", "n_head"), "query head", "query heads"),
    (("num_key_value_heads",), "key/value head", "key/value heads"),
    (("vocab_size",), "vocabulary entry", "vocabulary entries"),
)


def page_header(documents: Documents) -> Markup:
    """Title, one line, key figures, facts."""
    plan = documents.plan
    ranks = prod(plan["mesh"].values()) * plan.get("dp", 1)
    lede = f"{model_name(documents)} at {plan['seq_len']:,} tokens on {ranks} \u00d7 {plan['hardware']}"
    return tag(
        "header",
        tag("h1", f"Plan {documents.name}"),
        tag("p", lede, class_="lede"),
        tag("dl", (_key(*figure) for figure in _figures(plan)), class_="key"),
        tag("dl", ((tag("dt", name), tag("dd", value)) for name, value in _facts(documents, ranks)), class_="facts"),
    )


def model_name(documents: Documents) -> str:
    """The model's class, or `a model` where the fingerprint is gone."""
    names = (documents.program or {}).get("config", {}).get("architectures") or ["a model"]
    return names[0]


def _key(name: str, value: str, note: str) -> Markup:
    return tag("div", tag("dt", name), tag("dd", value, tag("small", note)))


def _figures(plan: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    batches, limit, peak = plan.get("grad_accumulation_steps", 1), plan["memory_limit_gib"], plan["peak_memory_gib"]["total"]
    yield "predicted step", seconds(plan["step_time_s"]), f"{seconds(plan['step_time_s'] / batches)} a micro-batch"
    yield "tokens a second", number(plan["tokens_per_s_per_gpu"]), "per GPU"
    yield "MFU", percent(plan["mfu_causal"]), f"causal; {percent(plan['mfu_full'])} counting full attention"
    yield "peak memory", gib(peak), f"of {gib(limit)} usable on a rank, {percent(peak / limit)}"


def _facts(documents: Documents, ranks: int) -> Iterator[tuple[str, Child]]:
    plan = documents.plan
    batches, units, rows = plan.get("grad_accumulation_steps", 1), plan.get("dp", 1), plan.get("micro_batch_size", 1)
    config = (documents.program or {}).get("config", {})
    sizes = [_size(config, *names) for names in _SIZES]
    if any(sizes):
        yield "model", ", ".join(size for size in sizes if size)
    if "precision" in (documents.program or {}).get("request", {}):
        yield "computed in", documents.program["request"]["precision"]
    tokens = plan["seq_len"] * rows * batches * units
    factors = (plural(rows, "sequence"), plural(batches, "micro-batch", "micro-batches"), plural(units, "scale unit"))
    yield "step", " \u00d7 ".join(factors) + f" = {tokens:,} tokens"
    yield "machine", f"{plural(ranks, 'rank')} of {plan['hardware']}"
    yield "mesh", mesh_text({"dp": units, **plan["mesh"]})
    if "storage" in plan:
        yield "storage", storage_text(plan["storage"]["zero"], plan["storage"].get("sharded", ()), plan["storage"].get("replicated", ()))
    elif "zero" in plan:
        yield "storage", storage_text(plan["zero"])
    if plan.get("host_memory_gib"):
        yield "host memory", f"{gib(plan['host_memory_gib'])} a rank, offloaded"
    for axis, part in plan.get("repeated", {}).items():
        yield "repeated", f"{part:.0%} of the compute runs whole on every rank of {axis}"


def _size(config: Mapping[str, Any], names: tuple[str, ...], one: str, many: str) -> str | None:
    value = next((config[name] for name in names if isinstance(config.get(name), int)), None)
    return None if value is None else plural(value, one, many)
