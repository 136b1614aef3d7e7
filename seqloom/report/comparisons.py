"""Predicted figures paired with measured ones, from the dry run, the rehearsal and the training run of a program.

In: `Documents`. Out: `Group`s of `Comparison`s, as plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from seqloom.report.documents import Documents, Training
from seqloom.report.text import flops, gib, nbytes, number, percent, plural, seconds, words


@dataclass(frozen=True)
class Comparison:
    """One figure; `predicted` is None where the plan says nothing of it."""

    name: str
    predicted: float | None
    measured: float
    show: Callable[[float], str]

    @property
    def ratio(self) -> float | None:
        """Predicted over measured; None where either is missing or zero."""
        return self.predicted / self.measured if self.predicted and self.measured else None


@dataclass(frozen=True)
class Group:
    """The comparisons of one source."""

    title: str
    rows: tuple[Comparison, ...]


def read_comparisons(documents: Documents) -> list[Group]:
    """A group for each measurement there is."""
    groups = []
    if documents.dryrun and documents.dryrun.get("ranks"):
        groups.append(_dry_run(documents.dryrun, documents.plan))
    if documents.rehearsal:
        groups.append(_rehearsal(documents.rehearsal, documents.plan))
    if documents.training:
        groups.append(_training(documents.training, documents.plan))
    return groups


def _dry_run(dryrun: Mapping[str, Any], plan: Mapping[str, Any]) -> Group:
    """The rank that needs most memory, beside the prediction written with it or, where there is none, the plan's."""
    rank = max(dryrun["ranks"], key=lambda rank: rank["peak_gib"])
    predicted = {**_plan_figures(plan), **(dryrun.get("predicted") or {})}
    several = f" of {plural(len(dryrun['ranks']), 'rank')}, the fullest" if len(dryrun["ranks"]) > 1 else ""
    return Group(f"Dry run, rank {rank['rank']}{several}", tuple(_dry_rows(rank, predicted)))


def _dry_rows(rank: Mapping[str, Any], predicted: Mapping[str, Any]) -> Iterator[Comparison]:
    yield Comparison("peak memory", predicted.get("peak_gib"), rank["peak_gib"], gib)
    for part, value in (rank.get("parts_gib") or {}).items():
        expected = (predicted.get("parts_gib") or {}).get(part)
        if value or expected:
            yield Comparison(words(part), expected, value, gib)
    if rank.get("host_gib") is not None and (rank["host_gib"] or predicted.get("host_gib")):
        yield Comparison("host memory", predicted.get("host_gib"), rank["host_gib"], gib)
    if rank.get("flops"):
        yield Comparison("arithmetic", predicted.get("flops"), rank["flops"], flops)
    for kind, value in (rank.get("comm_bytes") or {}).items():
        yield Comparison(words(kind), (predicted.get("comm_bytes") or {}).get(kind), value, nbytes)


def _plan_figures(plan: Mapping[str, Any]) -> dict[str, Any]:
    peak = plan["peak_memory_gib"]
    work = plan.get("flops_per_rank")
    return {
        "peak_gib": peak["total"],
        "parts_gib": {part: value for part, value in peak.items() if part != "total"},
        "host_gib": plan.get("host_memory_gib"),
        "flops": sum(work.values()) if work else None,
        "comm_bytes": plan["comm_bytes"],
    }


def _rehearsal(rehearsal: Mapping[str, Any], plan: Mapping[str, Any]) -> Group:
    predicted = {"step_s": plan["step_time_s"], "peak_gib": plan["peak_memory_gib"]["total"], **(rehearsal.get("predicted") or {})}
    rows = [Comparison("step", predicted["step_s"], rehearsal["step_s"], seconds)]
    parts = predicted.get("time_s", {})
    rows += [Comparison(words(part), parts.get(part), value, seconds) for part, value in (rehearsal.get("time_s") or {}).items()]
    if rehearsal.get("peak_gib") is not None:
        rows.append(Comparison("peak memory", predicted["peak_gib"], rehearsal["peak_gib"], gib))
    device = rehearsal.get("device_name") or rehearsal.get("device", "one device")
    steps = f", median of {plural(rehearsal['steps'], 'step')}" if rehearsal.get("steps") else ""
    return Group(f"Rehearsal of rank {rehearsal['rank']} on {device}{steps}", tuple(rows))


def _training(training: Training, plan: Mapping[str, Any]) -> Group:
    on_cpu = plan["hardware"].startswith("cpu")
    memory = "memory of the process" if on_cpu else "peak memory"
    rows = (
        Comparison("step", plan["step_time_s"], training.step_s, seconds),
        Comparison("tokens/s/GPU", plan["tokens_per_s_per_gpu"], training.tokens_per_s_per_gpu, number),
        Comparison("MFU, causal", plan["mfu_causal"], training.mfu_causal, percent),
        Comparison(memory, None if on_cpu else plan["peak_memory_gib"]["total"], training.peak_gib, gib),
    )
    return Group(f"Training, median of {plural(training.steps, 'step')}", rows)
