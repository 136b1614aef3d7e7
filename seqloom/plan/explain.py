"""`python -m seqloom explain`: a plan in words and tables, from its `plan.json`.

In: the folder of a compiled program. Out: lines of at most `WIDTH` columns: what was chosen and what is predicted, memory by part and what
binds, communication by kind, every operator with its runner-up and its price, the modes of the segments, the meshes that were rejected,
and which change would help most.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from seqloom.errors import UserError

PLAN, FINGERPRINT = "plan.json", "fingerprint.json"
WIDTH = 120
MOST = 10  # meshes listed
Row = Mapping[str, Any]


def run(folder: Path) -> int:
    """Print the plan in `folder`; return the exit code. Raises `UserError` where there is none, or where it is not readable."""
    plan, program = _read(folder / PLAN), _read(folder / FINGERPRINT)
    if plan is None:
        raise UserError(f"there is no {PLAN} in {folder}: compile a program with that --name first")
    if "blocks" not in plan or "solver" not in plan:
        raise UserError(f"{folder / PLAN} is not a plan of this version: compile the program again")
    print("\n".join(explain(plan, program or {})))
    return 0


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): compile the program again") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a JSON object: compile the program again")
    return document


def explain(plan: Row, program: Row) -> Iterator[str]:
    """The lines of the explanation of a `plan.json`; `program` is the fingerprint, or empty."""
    yield from _head(plan, program)
    yield from _shares("Time of one step, s", plan["time_s"], plan["step_time_s"], 3)
    yield from _memory(plan)
    yield from _communication(plan)
    for block, rows in plan["blocks"].items():
        yield from _block(block, rows, plan["segments"].get(block, {}))
    yield from _alternatives(plan)
    yield from _advice(plan)


def _head(plan: Row, program: Row) -> Iterator[str]:
    config = program.get("config", {})
    ranks = prod(plan["mesh"].values()) * plan["dp"]
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    model = config.get("architectures") or [config["model_type"]] if config else []
    names = [*model, *([_count(layers, "layer")] if layers else [])]
    batches = plan["grad_accumulation_steps"]
    tokens = (
        f"{_count(batches, 'micro-batch', 'micro-batches')} of {_count(plan['micro_batch_size'], 'sequence')} of {plan['seq_len']:,} tokens"
    )
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()) or "one rank"
    yield from _entry("model", ", ".join([*names, tokens]))
    yield from _entry("mesh", f"{mesh}, {_count(plan['dp'], 'scale unit')}: {ranks} x {plan['hardware']}")
    yield from _entry("storage", _storage(plan))
    yield from _entry(
        "predicted",
        f"{plan['step_time_s']:.4g} s a step, {plan['tokens_per_s_per_gpu']:,.0f} tokens/s/GPU, MFU {plan['mfu_causal']:.1%} causal, "
        f"{plan['mfu_full']:.1%} counting full attention",
    )
    if "binding" in plan:
        yield from _entry("limit", plan["binding"]["sentence"])
    for axis, share in plan["repeated"].items():
        yield from _entry("repeated", f"{share:.0%} of the compute runs whole on every rank of {axis}")
    solver = plan["solver"]
    yield from _entry(
        "solver",
        f"{solver['status']}, gap {solver['gap']:.1e}, {solver['programs']} programs of up to {solver['variables']:,} variables in "
        f"{solver['seconds']:.1f} s",
    )


def _storage(plan: Row) -> str:
    storage = plan.get("storage", {"zero": plan["zero"]})
    over = " and ".join(storage.get("sharded", ()))
    copies = " and ".join(storage.get("replicated", ()))
    return f"ZeRO {storage['zero']}" + (f" over {over}" if over else "") + (f", a copy on each rank of {copies}" if copies else "")


def _shares(title: str, parts: Mapping[str, float], total: float, digits: int) -> Iterator[str]:
    yield from ("", title)
    for part, value in parts.items():
        if value:
            yield f"  {part.replace('_', ' '):<20}{value:>12,.{digits}f}{value / total:>9.1%}"


def _memory(plan: Row) -> Iterator[str]:
    peak, limit = plan["peak_memory_gib"], plan["memory_limit_gib"]
    parts = {part: gib for part, gib in peak.items() if part != "total"}
    yield from _shares("Memory of one rank, GiB", parts, limit, 2)
    yield f"  {'peak':<20}{peak['total']:>12,.2f}{peak['total'] / limit:>9.1%}  of {limit:.2f}"
    if plan.get("host_memory_gib"):
        yield f"  {'on the host':<20}{plan['host_memory_gib']:>12,.2f}"


def _communication(plan: Row) -> Iterator[str]:
    sent = {kind: count / 1e9 for kind, count in plan["comm_bytes"].items()}
    if sent:
        yield from _shares("Sent by one rank in one step, GB", sent, sum(sent.values()), 3)
    else:
        yield from ("", "Nothing is sent between ranks.")


# --- operators -------------------------------------------------------------------------------------------------------------------


def _block(block: str, rows: Sequence[Row], segments: Mapping[str, Row]) -> Iterator[str]:
    """Every operator and reshard of a block, under the segment it lies in."""
    layers = next((sum(count for _, count in _modes(row)) for row in segments.values()), 1)
    yield from ("", f"{block} x {layers}, ms of one call" if segments else "Around the blocks, ms")
    yield f"  {'operator':<29}{'split':<22}{'forward':>9}{'backward':>10}  {'runner-up':<18}its price a step"
    segment = None
    for row in rows:
        if row.get("segment", segment) != segment:
            segment = row["segment"]
            if segment in segments:
                yield f"  -- {segment}: {_mode_words(segments[segment])}"
        yield _operator(row) if "operator" in row else _reshard(row)


def _modes(row: Row) -> list[tuple[str, int]]:
    """(mode, number of layers) of a segment, the modes that are used."""
    return [(mode, count) for mode, count in row.items() if mode not in ("tiles", "kept") and count]


def _mode_words(row: Row) -> str:
    words = {"keep": "kept", "recompute": "recomputed", "selective": "recomputed but for", "offload": "offloaded to the host"}
    words["spill"] = "replayed from the host"
    if row.get("tiles", 1) > 1:
        words |= {mode: f"{words[mode]} in {row['tiles']} tiles" for mode in ("recompute", "spill")}
    words["selective"] += f" {', '.join(row.get('kept', ()))}"
    return "; ".join(f"{_count(count, 'layer')} {words.get(mode, mode)}" for mode, count in _modes(row))


def _operator(row: Row) -> str:
    constants = "".join(f" {name}={value}" for name, value in row.get("constants", {}).items())
    line = f"  {_clip(row['operator'] + constants, 28):<29}{_clip(_letters(row['strategy']), 21):<22}{_times(row)}"
    if "runner_up" not in row:
        return line
    other = row["runner_up"]
    return f"{line}  {_clip(_letters(other['strategy']), 17):<18}{_price(other)}" if other else f"{line}  no other way"


def _price(other: Row) -> str:
    extra = other["extra_s"]
    price = f"{extra:+,.4g} s" if abs(extra) >= 1 else f"{extra * 1e3:+.3f} ms"
    return price if other.get("fits", True) else f"{price}, no room ({other['peak_memory_gib']:.0f} GiB)"


def _reshard(row: Row) -> str:
    return f"  {_clip('> ' + row['reshard'], 28):<29}{_clip(row['from'] + ' -> ' + row['to'], 21):<22}{_times(row)}"


def _times(row: Row) -> str:
    return f"{row['forward_s'] * 1e3:>9.3f}{row['backward_s'] * 1e3:>10.3f}"


def _letters(strategy: Mapping[str, str]) -> str:
    return " ".join(f"{letter}@{axis}" for axis, letter in strategy.items()) or "-"


# --- what else -------------------------------------------------------------------------------------------------------------------


def _alternatives(plan: Row) -> Iterator[str]:
    """Meshes that were not chosen, the quickest first."""
    others = [other for other in plan.get("alternatives", ()) if other["reason"]]
    if not others:
        return
    yield from ("", "Meshes that were not chosen")
    ordered = sorted(others, key=lambda other: other["step_time_s"] or float("inf"))
    for other in ordered[:MOST]:
        step = f"{other['step_time_s']:,.3f} s" if other["step_time_s"] is not None else "-"
        yield f"  {_clip(other['mesh'], 63):<64}{step:>12}  {_clip(other['reason'], 40)}"
    if len(ordered) > MOST:
        yield f"  and {len(ordered) - MOST} more"


def _advice(plan: Row) -> Iterator[str]:
    """What would help, the most helpful first."""
    if not plan.get("advice"):
        return
    yield from ("", "What would help")
    for change in plan["advice"]:
        figures = " " * 22 if change.get("gain") is None else f"{change['step_time_s']:>11,.3f} s {change['gain']:>+8.1%}"
        first, *rest = textwrap.wrap(change["sentence"], WIDTH - 62)
        yield f"  {_clip(change['change'], 35):<36}{figures}  {first}"
        yield from (" " * 62 + line for line in rest)


def _entry(name: str, text: str) -> Iterator[str]:
    first, *rest = textwrap.wrap(text, WIDTH - 11)
    yield f"{name:<11}{first}"
    yield from (" " * 11 + line for line in rest)


def _count(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."
