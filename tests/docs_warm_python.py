"""A `python` for the commands of the documentation that starts at once: every call is a fork of one process that has imported PyTorch.

Role: `WarmPython(folder)` makes `folder/bin/python` and `folder/bin/torchrun`, to be put first on PATH. Each hands its words, its folder,
its environment and its three standard streams to the server and waits for the exit code, so to a shell it is an ordinary program. Ranks
that torchrun starts come from the server too. Nothing of a call stays behind: it runs in a process of its own, which dies with its caller.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

PRELOAD = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.distributed._functional_collectives",
    "torch.utils.tensorboard",
    "torch.export",
    "safetensors.torch",
    "datasets",
    "matplotlib.figure",
    "scipy.optimize",
    "transformers.models.llama.modeling_llama",
    "seqloom.emit.pipeline",
    "seqloom.trainer.loop",
)
SIZE = 1 << 20
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class WarmPython:
    """The server, running until `close`. `bin` is the folder for PATH."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        here, socket_file = Path(__file__).resolve(), folder / "socket"
        for name, first in (("python", ""), ("torchrun", "-m torch.distributed.run")):
            program = self.bin / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {here} call {socket_file} {self.bin / "python"} {first} "$@"\n')
            program.chmod(0o755)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])}
        self._process = subprocess.Popen([sys.executable, here, "serve", socket_file], stdout=subprocess.PIPE, env=environment, text=True)
        assert self._process.stdout.readline() == "ready\n"

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def call(socket_file: str, python: str, words: list[str]) -> int:
    """In the caller's process: hand everything over, pass signals on, return the exit code."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.connect(socket_file)
    asked = {"words": words, "cwd": os.getcwd(), "env": {**os.environ, "PYTHON_EXEC": python}}
    streams = array.array("i", [0, 1, 2])
    server.sendmsg([b"+"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(json.dumps(asked).encode() + b"\n")
    answers = server.makefile()
    pid = int(answers.readline())
    for number in FORWARDED:
        signal.signal(number, lambda given, _: os.kill(pid, given))
    return int(answers.readline() or 1)


def serve(socket_file: str) -> None:
    """Import, then fork for every call, for ever."""
    for name in PRELOAD:
        __import__(name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(socket_file)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        caller, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os._exit(_attend(caller))
        caller.close()


def _attend(caller: socket.socket) -> int:
    """One call: fork the process that does the work, tell its number and its exit code; end it where the caller is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, ancillary, _, _ = caller.recvmsg(1, socket.CMSG_LEN(3 * array.array("i").itemsize))
    streams = array.array("i")
    streams.frombytes(ancillary[0][2])
    asked = json.loads(caller.makefile().readline())
    pid = os.fork()
    if pid == 0:
        caller.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _work(asked)
    for stream in streams:
        os.close(stream)
    caller.sendall(f"{pid}\n".encode())
    gone = os.pidfd_open(pid)
    ready, _, _ = select.select([gone, caller], [], [])
    if gone not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if gone in ready:
        caller.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
    return 0


def _work(asked: dict) -> None:
    """Be the program that was called."""
    import runpy

    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    code = 1
    words = [word for word in asked["words"] if word != "-u"]
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], asked["cwd"]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], asked["cwd"]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = words, os.path.dirname(os.path.realpath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.path[0] = str(Path(__file__).resolve().parents[1])
        serve(sys.argv[2])
    else:
        sys.exit(call(sys.argv[2], sys.argv[3], sys.argv[4:]))
