"""The commands beside training: `python -m seqloom {compile, explain, sweep, dryrun, rehearse, verify, check-op, report, generate, ...}`.

Every command parses its flags, imports the room that does the work, calls it and prints. Nothing heavy is imported before.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqloom.arguments import (
    PROG,
    CheckOpArguments,
    DiffArguments,
    DryRunArguments,
    ExplainArguments,
    FolderArguments,
    GenerateArguments,
    MagiArguments,
    ProfileArguments,
    RehearseArguments,
    ReportArguments,
    SweepArguments,
    VerifyArguments,
)
from seqloom.errors import UserError
from seqloom.trainer.config import CompileConfig, parse

Command = Callable[[Sequence[str], str], "int | None"]


def main() -> int | None:
    """Run the command named by the first argument. Raises `UserError` for an unknown one."""
    return _dispatch(COMMANDS, sys.argv[1:], PROG, __doc__)


def compile_command(args: Sequence[str], prog: str) -> None:
    """Compile a model into a program."""
    from seqloom.trainer.compile import compile_only

    compile_only(parse(CompileConfig, prog, args))


def explain_command(args: Sequence[str], prog: str) -> int:
    """Show what a plan chose, what the runners-up would cost, what binds, and what would help."""
    config = parse(ExplainArguments, prog, args)
    folder = config.program.folder
    from seqloom.plan.explain import run

    if config.advice and (folder / "plan.json").is_file():
        from seqloom.emit.advice import advise
        from seqloom.report.plan_page import PAGE

        advise(folder, lambda line: print(line, file=sys.stderr, flush=True))
        if (folder / PAGE).is_file():
            _with_page(folder, 0)
    return run(folder)


def sweep_command(args: Sequence[str], prog: str) -> int:
    """Find the best plan for every sequence length on every machine."""
    config = parse(SweepArguments, prog, args)
    from seqloom.emit.sweep import Sweep, parse_counts, run

    asked = Sweep(
        model_id=config.model_id,
        seq_lens=parse_counts("--seq_lens", config.seq_lens),
        gpus=parse_counts("--gpus", config.gpus),
        hardware=tuple(name.strip() for name in config.hardware.split(",")),
        micro_batch_size=config.micro_batch_size,
        grad_accumulation_steps=config.grad_accumulation_steps,
        precision=config.precision,
    )
    return run(asked, config.csv, lambda line: print(line, flush=True))


def magi_command(args: Sequence[str], prog: str) -> None:
    """Lay an attention mask over ranks."""
    config = parse(MagiArguments, prog, args)
    from seqloom.emit.sweep import parse_counts
    from seqloom.magi import show

    seq_len = None if config.seq_len is None else parse_counts("--seq_len", config.seq_len)[0]
    mask = show.parse_mask(config.mask, seq_len)
    sizes = (config.ranks, config.chunk_size, config.hardware, config.heads, config.kv_heads, config.head_dim, config.uneven, config.degree)
    layout = show.Layout(*sizes)
    for line in show.report(mask, layout):
        print(line)
    if config.picture is not None:
        show.picture(mask, show.planned(mask, layout).dispatch, config.picture)
        print(f"\nwrote {config.picture}")


def dryrun_command(args: Sequence[str], prog: str) -> int:
    """Run a program on fake tensors at full size, rank by rank."""
    config = parse(DryRunArguments, prog, args)
    folder = config.program.folder
    from seqloom.runtime.dryrun import run

    return _with_page(folder, run(folder, config.rank))


def rehearse_command(args: Sequence[str], prog: str) -> int:
    """Time one rank of a program on one real device, with simulated collectives."""
    config = parse(RehearseArguments, prog, args)
    folder = config.program.folder
    from seqloom.runtime.rehearse import run

    return _with_page(folder, run(folder, config.rank, config.device, config.steps, config.compile_blocks))


def report_command(args: Sequence[str], prog: str) -> None:
    """Write the page of a plan, of a run (--run), or of several runs laid over each other (--compare)."""
    config = parse(ReportArguments, prog, args)
    if config.run is not None and config.compare:
        raise UserError("--run writes one run's page and --compare one of several runs: leave one of them out")
    if config.compare:
        from seqloom.report.compare_page import write_compare_page

        print(f"wrote {write_compare_page(config.compare, config.output)}")
        return
    if config.run is not None:
        from seqloom.report.run_page import write_run_page

        print(f"wrote {write_run_page(config.run)}")
        return
    folder = config.program.folder
    from seqloom.report.plan_page import write_plan_page

    print(f"wrote {write_plan_page(folder, config.log_dir and config.log_dir / config.program.name)}")


def generate_command(args: Sequence[str], prog: str) -> None:
    """Let a merged model continue a prompt."""
    config = parse(GenerateArguments, prog, args)
    from seqloom.generate import Sampling, run

    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.seed)
    run(config.model, config.prompt, sampling, config.chat)


def verify_command(args: Sequence[str], prog: str) -> int:
    """Compare a plan, laid over a shrunken model, with the original model in fp64."""
    config = parse(VerifyArguments, prog, args)
    folder = config.program.folder
    from seqloom.runtime.verify import run

    return run(folder, config.ranks_per_axis)


def check_op_command(args: Sequence[str], prog: str) -> int:
    """Check the annotation of a registered operator."""
    config = parse(CheckOpArguments, prog, args)
    sizes = {name: _json(f"--sizes {name}", size, int) for name, size in _pairs("--sizes", config.sizes)}
    args = {name: _json(f"--args {name}", value, object) for name, value in _pairs("--args", config.args)}
    dtypes = dict(_pairs("--dtypes", config.dtypes))
    from seqloom.ops.check import check_op, format_report

    report = check_op(config.target, sizes=sizes, args=args, dtypes=dtypes, seed=config.seed)
    print(format_report(report))
    return 0 if report.ok else 1


def profile_command(args: Sequence[str], prog: str) -> None:
    """Measure this machine and write a hardware file."""
    config = parse(ProfileArguments, prog, args)
    import torch

    from seqloom.cost.hardware import load_hardware
    from seqloom.cost.profile import profile
    from seqloom.runtime.mesh import init_distributed
    from seqloom.trainer.start import choose_device_type, prepare_process

    base = None if config.base is None else load_hardware(config.base)
    device_type = choose_device_type(config.device or "cuda")
    if config.device == "cuda" and device_type == "cpu":
        raise UserError("there is no GPU on this machine that PyTorch can use: leave --device cuda away to measure its CPU")
    prepare_process(device_type, deterministic=False)
    device = init_distributed(device_type)
    try:
        profile(device, config.name, config.output or Path(f"{config.name}.json"), base, print)
    finally:
        torch.distributed.destroy_process_group()


def checkpoint_command(args: Sequence[str], prog: str) -> int | None:
    """List, verify, show or compare checkpoints."""
    return _dispatch(CHECKPOINT_COMMANDS, args, prog, "Look at checkpoints.")


def list_command(args: Sequence[str], prog: str) -> None:
    """A line per checkpoint of a run, or of every run in a folder."""
    path = parse(FolderArguments, prog, args).path
    from seqloom.checkpoint.inspect import list_checkpoints

    _print_lines(list_checkpoints(path))


def verify_checkpoint_command(args: Sequence[str], prog: str) -> None:
    """Check all sizes and digests of a checkpoint."""
    path = parse(FolderArguments, prog, args).path
    from seqloom.checkpoint.inspect import verify_checkpoint

    print(verify_checkpoint(path))


def show_command(args: Sequence[str], prog: str) -> None:
    """Training state and tensors of a checkpoint."""
    path = parse(FolderArguments, prog, args).path
    from seqloom.checkpoint.inspect import show_checkpoint

    _print_lines(show_checkpoint(path))


def diff_command(args: Sequence[str], prog: str) -> int:
    """Compare two checkpoints; exit code 1 when they differ."""
    config = parse(DiffArguments, prog, args)
    from seqloom.checkpoint.compare import compare

    found = compare(config.first, config.second)
    _print_lines(found.text())
    return 0 if found.equal else 1


COMMANDS: Mapping[str, Command] = {
    "compile": compile_command,
    "explain": explain_command,
    "sweep": sweep_command,
    "dryrun": dryrun_command,
    "rehearse": rehearse_command,
    "report": report_command,
    "generate": generate_command,
    "verify": verify_command,
    "check-op": check_op_command,
    "magi": magi_command,
    "profile": profile_command,
    "checkpoint": checkpoint_command,
}
CHECKPOINT_COMMANDS: Mapping[str, Command] = {
    "list": list_command,
    "verify": verify_checkpoint_command,
    "show": show_command,
    "diff": diff_command,
}


def _dispatch(commands: Mapping[str, Command], args: Sequence[str], prog: str, description: str) -> int | None:
    """Call the command that the first argument names, with the rest; without one, or with --help, list them."""
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, commands))
        print(f"{description.splitlines()[0]}\n\nusage: {prog} COMMAND [--help] ...\n")
        for name, command in commands.items():
            print(f"  {name:<{width}}  {command.__doc__}")
        return 0 if args else 2
    name = args[0].replace("_", "-")
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1, cutoff=0.4)
        nearest = f"did you mean `{prog} {close[0]}`?" if close else f"there are {', '.join(commands)}"
        raise UserError(f"`{prog}` has no command {args[0]}: {nearest}")
    return commands[name](args[1:], f"{prog} {name}")


def _with_page(folder: Path, code: int) -> int:
    """The exit code of a measurement, after its figures are put on the program's page."""
    from seqloom.report.plan_page import write_plan_page

    write_plan_page(folder)
    return code


def _pairs(flag: str, texts: Iterable[str]) -> list[tuple[str, str]]:
    """`l=8` -> `("l", "8")`."""
    for text in texts:
        if not all(text.partition("=")):
            raise UserError(f"{flag} {text} is not NAME=VALUE: write for example {flag} {text.split('=')[0] or 'l'}=8")
    return [(text.partition("=")[0], text.partition("=")[2]) for text in texts]


def _json(what: str, text: str, kind: type) -> Any:
    """A value given as JSON, of a type."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None if kind is int else text
    if not isinstance(value, kind):
        raise UserError(f"{what}={text} is not a whole number: write for example {what}=8")
    return value


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
