"""The next step's data, read and laid out while the present step runs.

Role in the pipeline: between the loader and the step. Reading rows, planning the keys of their documents and reordering tokens take the
host's time; a thread does it one step ahead. The loader's place is always that behind the last step handed out, so a checkpoint never
skips rows.
"""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor

from seqloom.data.loader import Loader, Place
from seqloom.runtime.context import Layout, Prepared

Step = tuple[list[Prepared], Place]


class Ahead:
    """`next_step()` as the loader's, with micro-batches laid out for the program."""

    def __init__(self, loader: Loader, layout: Layout) -> None:
        self._loader, self._layout = loader, layout
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._next: tuple[Place, Future[Step]] | None = None

    def next_step(self) -> list[Prepared]:
        """The micro-batches of the next step; the step behind it is begun."""
        place = self._loader.place
        if self._next is None or self._next[0] != place:
            self._next = (place, self._pool.submit(self._read, place))
        batches, after = self._next[1].result()
        self._loader.place = after
        self._next = (after, self._pool.submit(self._read, after))
        return batches

    def close(self) -> None:
        """Drop what was begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, place: Place) -> Step:
        reader = copy.copy(self._loader)
        reader.place = place
        return [self._layout.prepare(batch) for batch in reader.next_step()], reader.place
