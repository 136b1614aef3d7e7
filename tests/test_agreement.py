"""What a rank tells the others of itself is its own."""

import subprocess
import sys

from seqloom.trainer import agreement

CHILD = """
import resource
from seqloom.trainer.agreement import peak_resident_gib
print(peak_resident_gib(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
held = bytearray(2**28)
held[::4096] = b"x" * len(held[::4096])
print(peak_resident_gib())
"""
PARENT = """
import subprocess, sys
held = bytearray(2**30)
held[::4096] = b"x" * len(held[::4096])
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True, preexec_fn=lambda: None)  # by fork, as torchrun's agent starts ranks
"""


def test_peak_memory_is_not_that_of_the_process_that_started_the_rank():
    done = subprocess.run([sys.executable, "-c", PARENT, CHILD], capture_output=True, text=True, timeout=120, check=True)
    (own, counted), (later,) = ([float(word) for word in line.split()] for line in done.stdout.splitlines())
    assert counted > 1 > own  # what `getrusage` says begins with the parent's
    assert own + 0.2 < later < own + 0.3


def test_peak_memory_where_the_system_tells_no_more(monkeypatch, tmp_path):
    monkeypatch.setattr(agreement, "_STATUS", tmp_path / "none")
    assert 0.01 < agreement.peak_resident_gib() < 100
