"""Merge a checkpoint of Llama 3 8B, as 8 ranks write it, into a Hugging Face folder in bf16: peak memory, time, and whether it is right.

    python benchmarks/checkpoint_merge.py                    # needs 52 GB of disk, all of it given back
    python benchmarks/checkpoint_merge.py --write            # and kept in benchmarks/results/checkpoint_merge.json
    python benchmarks/checkpoint_merge.py --model llama3_1b  # a smaller one

What is real: every tensor of the training state in its true name, shape and type (fp32 masters and two moments of each parameter, a
step count), cut by rows over 8 ranks as FSDP2 cuts them, in files of at most 4 GiB, with digests of all bytes; the parameters' bytes, 32
GB, taken from a pool of random numbers, for each parameter from another place; the merge itself, which is `ckpt_merger.py` started as a
user starts it, verification of all 96 GB included; its 16 GB of output. What is not: no model was trained, no ranks ran, and the moments,
64 GB, are holes of sparse files, which read as zeros.

Peak memory is the merger's largest resident set, as the system counts it; it is meant to be under 4 GB. The result is compared with the
pool, element by element, in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jobs import keep, machine

from seqloom.checkpoint import folders
from seqloom.checkpoint.digest import BlockHasher
from seqloom.checkpoint.huggingface import HFReader
from seqloom.checkpoint.manifest import MANIFEST, FileEntry, Manifest, Piece, TensorEntry
from seqloom.checkpoint.slices import Box
from seqloom.checkpoint.tensorfile import TensorFileWriter, TensorInfo
from seqloom.checkpoint.write import MAX_FILE_BYTES

ROOT = Path(__file__).resolve().parents[1]
RANKS, STEP = 8, 1000
MOMENTS = ("exp_avg", "exp_avg_sq")
POOL = torch.randn(2**24 + 3, generator=torch.Generator().manual_seed(0)) * 0.02
BATCH = 2**22  # elements


def main() -> None:
    """Write the checkpoint, merge it, compare, print, and leave nothing behind; exit with 1 where memory or values are not as meant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3_8b", help="a name in configs/models of the Llama family")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--write", action="store_true", help="keep the figures in results/checkpoint_merge.json")
    args = parser.parse_args()
    config = json.loads((ROOT / "configs" / "models" / f"{args.model}.json").read_text(encoding="utf-8"))
    where = machine()
    with tempfile.TemporaryDirectory(prefix="seqloom-merge-", dir=args.folder) as folder:
        found = measure(Path(folder), config)
    for name, value in found.items():
        print(f"{name:32}{value}")
    if args.write:
        content = {"machine": where, "torch": torch.__version__, "model": args.model, "ranks": RANKS, **found}
        keep("checkpoint_merge", content)
    sys.exit(0 if found["equal"] and found["peak_gb"] < 4 else 1)


def measure(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """All figures; the merged folder is compared before it goes."""
    shapes = parameter_shapes(config)
    run, output = folder / "run", folder / "hf"
    begin = time.perf_counter()
    step = write_step(run, shapes, config)
    written = time.perf_counter() - begin
    stored = [path.stat() for path in step.glob("*.safetensors")]
    command = [sys.executable, str(ROOT / "ckpt_merger.py"), "--ckpt_dir", str(run), "--hf_output", str(output), "--dtype", "bfloat16"]
    begin = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "tensors": len(shapes) * (2 + len(MOMENTS)),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "checkpoint_gb": sum(stat.st_size for stat in stored) / 1e9,
        "of_it_on_disk_gb": sum(stat.st_blocks * 512 for stat in stored) / 1e9,
        "files": len(stored),
        "written_s": round(written, 1),
        "merged_s": round(seconds, 1),
        "output_gb": sum(path.stat().st_size for path in output.glob("*.safetensors")) / 1e9,
        "output_files": len(list(output.glob("*.safetensors"))),
        "largest_tensor_gb": max(math.prod(shape) for shape in shapes.values()) * 4 / 1e9,
        "peak_gb": round(peak / 1e9, 3),
        "equal": is_right(output, shapes),
    }


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of a Llama."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if config.get("tie_word_embeddings") else shapes | {"lm_head.weight": (vocab, hidden)}


def values(name: str, first: int, count: int) -> Iterator[torch.Tensor]:
    """The elements `first : first + count` of a parameter, in batches: a stretch of the pool that starts where its name says."""
    place = int.from_bytes(name.encode(), "big") % len(POOL)
    while count:
        start = (first + place) % len(POOL)
        part = POOL[start : start + min(count, BATCH)]
        yield part
        first, count = first + len(part), count - len(part)


class SparseFile:
    """In place of a writer's file: while `hole` is set it leaves holes where it should write."""

    def __init__(self, file: Any) -> None:
        self._file, self.hole, self.name = file, False, file.name

    def write(self, data: memoryview) -> int:
        """Write, or leave a hole of as many bytes; how many there were."""
        if not self.hole:
            return self._file.write(data)
        self._file.truncate(self._file.seek(len(data), os.SEEK_CUR))
        return len(data)

    def fileno(self) -> int:
        """Of the file."""
        return self._file.fileno()

    def close(self) -> None:
        """Of the file."""
        self._file.close()


def write_step(run: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> Path:
    """A step folder as 8 ranks write it, and its manifest."""
    run.mkdir()
    staging = folders.make_staging(run / f"step-{STEP}")
    files: dict[str, FileEntry] = {}
    pieces: dict[str, list[Piece]] = {}
    infos: dict[str, TensorInfo] = {}
    for rank in range(RANKS):
        jobs = list(rank_jobs(rank, shapes, infos))
        for number, part in enumerate(split(jobs, infos)):
            name = f"shard-{rank:05d}.safetensors" if number == 0 else f"shard-{rank:05d}-{number}.safetensors"
            files[name] = write_shard(staging / name, part, infos)
            for tensor, box in part:
                pieces.setdefault(tensor, []).append(Piece(name, key_of(tensor, box, infos), box))
    (staging / "hf").mkdir()
    text = (json.dumps(config) + "\n").encode()
    folders.write_durably(staging / "hf" / "config.json", text)
    files["hf/config.json"] = file_entry(text)
    entries = {name: TensorEntry(info, tuple(pieces[name])) for name, info in infos.items()}
    manifest = Manifest(STEP, RANKS, files, entries, {"step": STEP})
    folders.write_durably(staging / MANIFEST, manifest.to_bytes())
    folders.commit(staging, run / f"step-{STEP}")
    return run / f"step-{STEP}"


def rank_jobs(rank: int, shapes: dict[str, tuple[int, ...]], infos: dict[str, TensorInfo]) -> Iterator[tuple[str, Box]]:
    """What a rank writes: its rows of every parameter and moment; rank 0 also the step counts. Notes their shapes in `infos`."""
    for prefix in ("model", *(f"optimizer.{moment}" for moment in MOMENTS)):
        for name, shape in shapes.items():
            infos[f"{prefix}.{name}"] = TensorInfo(shape, torch.float32)
            rows = -(-shape[0] // RANKS)
            first = min(rank * rows, shape[0])
            count = min(rows, shape[0] - first)
            if count:
                yield f"{prefix}.{name}", Box((first, *(0 for _ in shape[1:])), (count, *shape[1:]))
    for name in shapes:
        infos[f"optimizer.step.{name}"] = TensorInfo((), torch.float32)
        if rank == 0:
            yield f"optimizer.step.{name}", Box((), ())


def split(jobs: list[tuple[str, Box]], infos: dict[str, TensorInfo]) -> Iterator[list[tuple[str, Box]]]:
    """Jobs in files of at most `MAX_FILE_BYTES`."""
    part: list[tuple[str, Box]] = []
    filled = 0
    for name, box in jobs:
        size = box.numel * infos[name].dtype.itemsize
        if part and filled + size > MAX_FILE_BYTES:
            yield part
            part, filled = [], 0
        part.append((name, box))
        filled += size
    yield part


def key_of(name: str, box: Box, infos: dict[str, TensorInfo]) -> str:
    """A piece's name in its shard file."""
    return name if box.sizes == infos[name].shape else f"{name}@{','.join(map(str, box.offsets))}"


def write_shard(path: Path, part: list[tuple[str, Box]], infos: dict[str, TensorInfo]) -> FileEntry:
    """One file: parameters from the pool, moments as holes, step counts as they are."""
    tensors = {key_of(name, box, infos): TensorInfo(box.sizes, infos[name].dtype) for name, box in part}
    zeros = torch.zeros(BATCH)
    with TensorFileWriter(path, tensors, {"format": "pt"}) as writer:
        writer._file = SparseFile(writer._file)
        for name, box in part:
            kind, _, rest = name.partition(".")
            if kind == "model":
                row = math.prod(box.sizes[1:])
                for batch in values(rest, box.offsets[0] * row, box.numel):
                    writer.append(batch)
            elif name.startswith("optimizer.step."):
                writer.append(torch.tensor(float(STEP)))
            else:
                writer._file.hole = True
                for first in range(0, box.numel, BATCH):
                    writer.append(zeros[: box.numel - first])
                writer._file.hole = False
    return FileEntry(writer.nbytes, writer.blocks)


def file_entry(data: bytes) -> FileEntry:
    """Size and digests of a small file."""
    hasher = BlockHasher()
    hasher.update(data)
    return FileEntry(len(data), hasher.blocks())


def is_right(output: Path, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the folder holds every parameter, none else, in bf16 and element by element as the pool says."""
    reader = HFReader(output)
    if set(reader) != set(shapes) or any(reader[name] != (shape, torch.bfloat16) for name, shape in shapes.items()):
        return False
    for name in shapes:
        first = 0
        for batch in reader.batches(name):
            flat = batch.reshape(-1)
            expected = torch.cat([part.bfloat16() for part in values(name, first, len(flat))])
            if not torch.equal(flat, expected):
                return False
            first += len(flat)
    reader.close()
    return True


if __name__ == "__main__":
    main()
