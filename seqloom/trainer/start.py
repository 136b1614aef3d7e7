"""What must be true before a run begins: ranks, device, folders, data. Each mistake is one sentence, told before the long work."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

import torch

from seqloom.capture.architecture import architecture_names, weights_folder
from seqloom.checkpoint import folders
from seqloom.errors import UserError
from seqloom.trainer.config import LAST, TrainConfig

RANKS_PER_NODE = 8


def check_world_size(world_size: int, runtime_ngpus: int) -> None:
    """Raise `UserError` with the command to use where the job does not have `runtime_ngpus` ranks."""
    if world_size != runtime_ngpus:
        raise UserError(
            f"this job has {world_size} rank{'s' * (world_size != 1)}, but --runtime_ngpus is {runtime_ngpus}: "
            f"start it with `{launch_command(runtime_ngpus, sys.argv)}`, or change --runtime_ngpus"
        )


def launch_command(ranks: int, argv: list[str]) -> str:
    """The command that starts `argv` on so many ranks, on machines of eight GPUs where there are more."""
    if ranks == 1:
        return shlex.join(["python", *argv])
    nodes = ranks // RANKS_PER_NODE if ranks > RANKS_PER_NODE and ranks % RANKS_PER_NODE == 0 else 1
    where = [] if nodes == 1 else [f"--nnodes={nodes}"]
    return shlex.join(["torchrun", *where, f"--nproc_per_node={ranks // nodes}", *argv])


def choose_device_type(hardware: str) -> str:
    """`cuda` where there is a GPU for every rank of this machine, `cpu` where there is none or the plan is for one."""
    if hardware == "cpu" or not torch.cuda.is_available():
        return "cpu"
    ranks, devices = _local_ranks(), torch.cuda.device_count()
    if ranks > devices:
        raise UserError(f"this machine has {devices} GPUs for {ranks} ranks: start at most {devices} ranks on it, or use --hardware cpu")
    return "cuda"


def prepare_process(device_type: str, deterministic: bool) -> None:
    """Give each rank of a machine its share of the cores, and make PyTorch deterministic if asked. Call it before the GPU is used."""
    if device_type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _local_ranks()))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def resume_source(config: TrainConfig) -> str | None:
    """Where the run continues from: what --resume_path says; this run's own newest checkpoint where torchrun has restarted the job."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return LAST if restarted and folders.steps(config.run_folder) else config.output.resume_path


def check_space(config: TrainConfig, nbytes: int) -> None:
    """Raise `UserError` where the disk has no room for one checkpoint of so many bytes: better now than after the first thousand steps."""
    folders.require_space(config.run_folder, nbytes, f"a checkpoint of {config.compile.name}")


def check_folders(config: TrainConfig) -> None:
    """Raise `UserError` where checkpoints or logs cannot be written, or where a new run would meet the checkpoints of an old one."""
    for flag, folder in (("--checkpoint_dir", config.run_folder), ("--log_dir", config.log_folder)):
        require_writable(folder, flag)
    steps = folders.steps(config.run_folder)
    if steps and resume_source(config) is None:
        raise UserError(
            f"{config.run_folder} holds the checkpoints of an earlier run, up to step {steps[-1]}: "
            f"continue it with --resume_path {LAST}, or start a new one with another --name"
        )


def check_later_checkpoints(config: TrainConfig, step: int) -> None:
    """Raise `UserError` where a run that continues from `step` would meet good checkpoints of later steps of its own name.

    `--resume_path last` passed over later ones only because they are damaged; saving sets those aside.
    """
    later = [found for found in folders.steps(config.run_folder) if found > step]
    if later and resume_source(config) != LAST:
        raise UserError(
            f"{config.run_folder} holds checkpoints after step {step}, up to step {later[-1]}, which are never written over: "
            f"continue from {config.output.resume_path} under another --name"
        )


def require_writable(folder: Path, flag: str) -> None:
    """Make a folder and try to write in it. Raises `UserError` naming the flag that chose it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error.strerror}): give {flag} a folder that can be written") from error


def choose_weights(model_id: str, init: str | None) -> Path | None:
    """The folder of the weights to start from, None for random ones.

    A folder or a name in configs/models without weights starts at random unless `init` asks for weights. A hub id stands for its trained
    weights: they must be on this machine, or `init` must say that random ones are meant.
    """
    if init == "random":
        return None
    folder = weights_folder(model_id)
    means_weights = init == "weights" or not (Path(model_id).expanduser().is_dir() or model_id in architecture_names())
    if folder is None and means_weights:
        raise UserError(
            f"the safetensors weights of {model_id} are not on this machine: fetch them (`hf download {model_id}`) or name their folder "
            f"with --model_id, or start from scratch with --init random"
        )
    return folder


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
