"""The machine as data: memory, arithmetic, links and achieved rates, read from `configs/hardware/*.json`.

Role in the pipeline: `load_hardware` gives the `Hardware` that `cost.compute` and `cost.communication` turn into seconds and that the
planner takes its memory limit from. Nothing here asks the present machine: a plan for eight H100s is made on any laptop. A file has
exactly the fields of `Hardware`; `to_json` writes one back, so that a measuring program can make such a file.

Units: bytes, seconds, bytes per second, FLOPS (operations per second, a multiply-add counting two). One GPU or one CPU process is a
"device"; every figure is per device.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from seqloom.cost.fields import Fields
from seqloom.errors import UserError
from seqloom.ops.kernel_rates import FOLDER, AttentionRate

GIB = 2**30
CollectiveKind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


@dataclass(frozen=True)
class Link:
    """One level of the interconnect.

    `ranks_per_group` consecutive ranks reach each other through this level (8 for NVLink in a node of 8; the outermost level bounds the
    size of the machine). `latency_s` is the cost of one step of a collective; `bandwidth_bytes_per_s` what one rank achieves in a
    collective, in one direction, of the bytes that `communication.wire_bytes` counts (the "bus bandwidth" of nccl-tests).
    """

    name: str
    ranks_per_group: int
    latency_s: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True)
class Arithmetic:
    """Achieved fractions of the peak FLOPS of one dtype.

    `matmul`: (smallest of m, n, k; fraction), dimensions rising; between two points the fraction is linear.
    `attention`: kernel name -> rates; plans are made for the first kernel where no other is asked for, and runs choose by the rates.
    """

    matmul: tuple[tuple[int, float], ...]
    attention: Mapping[str, AttentionRate]


@dataclass(frozen=True)
class Rates:
    """Achieved rates by shape class, as fractions of the peaks.

    `matmul`, `attention`: as in `Arithmetic`, for every dtype that `by_dtype` does not name (a CPU's bfloat16 attention reaches another
    share of its peak than its float32 attention).
    `pointwise`: fraction of the memory bandwidth that elementwise kernels and copies reach.
    `collectives`: kind -> fraction of a link's bandwidth that this kind reaches (gloo gathers at a third of the rate of its all-to-all).
    `fused`: whether a chain of elementwise operators runs as one kernel, as `torch.compile` makes it, or each operator by itself.
    `overlap`: fraction of the communication of parameters and gradients that can run beside compute (none over gloo: FSDP2 waits for it).
    """

    matmul: tuple[tuple[int, float], ...]
    attention: Mapping[str, AttentionRate]
    pointwise: float
    collectives: Mapping[CollectiveKind, float]
    by_dtype: Mapping[str, Arithmetic] = field(default_factory=dict)
    fused: bool = True
    overlap: float = 1.0

    def arithmetic(self, dtype: torch.dtype) -> Arithmetic:
        """The fractions that hold for `dtype`."""
        name = str(dtype).removeprefix("torch.")
        return self.by_dtype[name] if name in self.by_dtype else Arithmetic(self.matmul, self.attention)


@dataclass(frozen=True)
class Hardware:
    """One kind of device and how many of them are joined.

    `memory_bytes` is the total that the device reports to a program (below the sold size in GiB: an 80 GB H100 reports 79.1 GiB);
    `allocator_margin` the fraction of it that a plan leaves free for the context, communication buffers and fragmentation.
    `peak_flops` maps dtype names (`bfloat16`) to dense peaks. `links` go from the inner to the outer level. `host_link_bandwidth` is
    the achieved rate between device and host memory in one direction, `host_memory_bytes` what one device may use there (0: nothing is
    offloaded, as on a CPU, whose memory is the host's). `launch_overhead_s` is the least time a kernel takes.
    `sources` say where the figures come from.
    """

    name: str
    memory_bytes: int
    allocator_margin: float
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    host_link_bandwidth: float
    launch_overhead_s: float
    links: tuple[Link, ...]
    rates: Rates
    sources: tuple[str, ...]
    host_memory_bytes: int = 0

    @property
    def usable_bytes(self) -> int:
        """What a plan may use at its peak: the memory less the allocator margin."""
        return int(self.memory_bytes * (1 - self.allocator_margin))

    def with_memory_gib(self, gib: float) -> Hardware:
        """The same machine with `gib` GiB of device memory (the margin is still taken from it). `UserError` unless above 0."""
        if not (math.isfinite(gib) and gib > 0):
            raise UserError(f"memory of {gib} GiB is impossible: give a number of GiB above 0 (hardware `{self.name}`)")
        return dataclasses.replace(self, memory_bytes=int(gib * GIB))

    def with_attention_kernel(self, kernel: str) -> Hardware:
        """The same machine with `kernel` for attention. Raises `UserError` where there are no rates for it."""
        if kernel not in self.rates.attention:
            known = ", ".join(self.rates.attention)
            raise UserError(f"hardware `{self.name}` has no rates for attention kernel `{kernel}`: it has {known}")
        by_dtype = {
            name: dataclasses.replace(rates, attention=_first(kernel, rates.attention)) for name, rates in self.rates.by_dtype.items()
        }
        rates = dataclasses.replace(self.rates, attention=_first(kernel, self.rates.attention), by_dtype=by_dtype)
        return dataclasses.replace(self, rates=rates)

    def peak(self, dtype: torch.dtype) -> float:
        """Dense peak FLOPS for `dtype`; `UserError` where the description has none."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.peak_flops:
            known = ", ".join(self.peak_flops)
            raise UserError(f"hardware `{self.name}` gives no peak_flops for {name} (it has {known}): add it to the hardware file")
        return self.peak_flops[name]


def _first(kernel: str, kernels: Mapping[str, AttentionRate]) -> dict[str, AttentionRate]:
    """The kernels with `kernel` in front, where it is one of them."""
    return dict(sorted(kernels.items(), key=lambda item: item[0] != kernel))


def hardware_names() -> list[str]:
    """Names that `load_hardware` knows: the files of `configs/hardware`, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_hardware(name_or_path: str | Path) -> Hardware:
    """The description called `name_or_path` in `configs/hardware`, or in a JSON file of the user's.

    Raises `UserError` for an unknown name (with the nearest ones), an unreadable file, and a missing, unknown or impossible field.
    """
    text = str(name_or_path)
    if text in hardware_names():
        content = (FOLDER / f"{text}.json").read_text(encoding="utf-8")
        return parse_hardware(content, f"configs/hardware/{text}.json")
    path = Path(text)
    if path.is_file():
        try:
            return parse_hardware(path.read_text(encoding="utf-8"), text)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"hardware file {text} cannot be read ({error}): give a readable JSON file") from error
    if path.suffix == ".json" or path.name != text:
        raise UserError(f"hardware file {text} does not exist: give an existing JSON file or one of {', '.join(hardware_names())}")
    near = difflib.get_close_matches(text, hardware_names(), n=3, cutoff=0.3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(hardware_names())}"
    raise UserError(f"hardware `{text}` is neither a name in configs/hardware nor a file: {hint}")


def parse_hardware(content: str, where: str) -> Hardware:
    """The description in the JSON text `content`; `where` names it in errors. Raises `UserError` as `load_hardware` does."""
    try:
        data = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON (line {error.lineno}: {error.msg}): mend that line") from error
    fields = Fields.of(Hardware, data, where)
    hardware = Hardware(
        name=fields.text("name"),
        memory_bytes=fields.integer("memory_bytes"),
        allocator_margin=fields.number("allocator_margin", least=0.0, below=1.0),
        peak_flops=fields.mapping("peak_flops").numbers(),
        memory_bandwidth=fields.number("memory_bandwidth"),
        host_link_bandwidth=fields.number("host_link_bandwidth"),
        launch_overhead_s=fields.number("launch_overhead_s", least=0.0),
        links=tuple(_parse_link(link) for link in fields.objects("links", Link)),
        rates=_parse_rates(fields.object("rates", Rates)),
        sources=fields.texts("sources"),
        host_memory_bytes=int(fields.number("host_memory_bytes", least=0.0)) if fields.has("host_memory_bytes") else 0,
    )
    _check_dtypes(hardware, where)
    _check_links(hardware, where)
    return hardware


def to_json(hardware: Hardware) -> str:
    """The file content that `parse_hardware` reads back as an equal `Hardware`."""
    return json.dumps(dataclasses.asdict(hardware), indent=2) + "\n"


def _parse_link(fields: Fields) -> Link:
    return Link(
        name=fields.text("name"),
        ranks_per_group=fields.integer("ranks_per_group"),
        latency_s=fields.number("latency_s", least=0.0),
        bandwidth_bytes_per_s=fields.number("bandwidth_bytes_per_s"),
    )


def _parse_rates(fields: Fields) -> Rates:
    kinds = get_args(CollectiveKind)
    collectives = Fields(fields.data["collectives"], f"{fields.where}: collectives", kinds)
    common = _parse_arithmetic(fields)
    by_dtype = Fields(fields.data.get("by_dtype", {}), f"{fields.where}: by_dtype")
    return Rates(
        matmul=common.matmul,
        attention=common.attention,
        pointwise=fields.fraction("pointwise"),
        collectives={kind: collectives.fraction(kind) for kind in kinds},
        by_dtype={name: _parse_arithmetic(by_dtype.object(name, Arithmetic)) for name in by_dtype.data},
        fused=fields.truth("fused") if fields.has("fused") else True,
        overlap=fields.fraction("overlap", least=0.0) if fields.has("overlap") else 1.0,
    )


def _parse_arithmetic(fields: Fields) -> Arithmetic:
    attention = fields.mapping("attention")
    kernels = {kernel: attention.object(kernel, AttentionRate) for kernel in attention.data}
    rates = {k: AttentionRate(forward=f.fraction("forward"), backward=f.fraction("backward")) for k, f in kernels.items()}
    return Arithmetic(_parse_matmul(fields), rates)


def _parse_matmul(fields: Fields) -> tuple[tuple[int, float], ...]:
    """The (dimension, fraction) points, checked so that a larger matmul is never predicted to be faster than a smaller one."""
    points = []
    for index, pair in enumerate(fields.items("matmul")):
        where = f"{fields.where}: matmul[{index}]"
        if not (isinstance(pair, list) and len(pair) == 2):
            raise UserError(f"{where} must be [smallest dimension, fraction of peak], not {pair!r}")
        entry = Fields({"dimension": pair[0], "fraction": pair[1]}, where)
        points.append((entry.integer("dimension"), entry.fraction("fraction")))
    for (size, rate), (next_size, next_rate) in zip(points, points[1:], strict=False):
        if not (size < next_size and rate <= next_rate and rate / size >= next_rate / next_size):
            raise UserError(
                f"{fields.where}: matmul points {[size, rate]} and {[next_size, next_rate]} are out of order: dimensions must rise, "
                "and fractions must rise no faster than the dimensions"
            )
    return tuple(points)


def _check_dtypes(hardware: Hardware, where: str) -> None:
    for field_name, names in (("peak_flops", hardware.peak_flops), ("rates: by_dtype", hardware.rates.by_dtype)):
        for name in names:
            if not isinstance(getattr(torch, name, None), torch.dtype):
                raise UserError(f"{where}: {field_name} has `{name}`, which is no PyTorch dtype: use names such as bfloat16 or float32")


def _check_links(hardware: Hardware, where: str) -> None:
    for inner, outer in zip(hardware.links, hardware.links[1:], strict=False):
        if inner.ranks_per_group >= outer.ranks_per_group:
            raise UserError(
                f"{where}: link `{outer.name}` ({outer.ranks_per_group} ranks) comes after `{inner.name}` ({inner.ranks_per_group} "
                "ranks): list links from the inner to the outer, each with a larger ranks_per_group"
            )
