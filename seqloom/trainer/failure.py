"""When ranks fail: the job ends at once, non-zero, and the rank that failed first is the one that speaks.

In a job of many ranks one failure makes many: the others lose their connection and fail too. The first rank to fail claims the word in
the job's store; ranks that fail after it with the same mistake of the user's, or with a lost connection, leave without a sound.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import torch.distributed as dist

from seqloom.errors import EXIT_STOPPED, EXIT_USER_ERROR, Stopped, UserError

EXIT_FAILURE = 1
GRACE_SECONDS = 5.0
_KEY = "seqloom/first_failure"


@contextlib.contextmanager
def first_failure_speaks() -> Iterator[None]:
    """Put this around everything that ranks do together: the error of the first rank to fail goes on to the entry point.

    A rank that only follows (`follows`) ends here, silent and with the same exit code, after a moment in which the launcher ends it:
    leaving before the first one could hide what that one says. A process alone always speaks.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not dist.is_initialized() or dist.get_world_size() == 1 or claim_word() or not follows(error):
            raise
        time.sleep(GRACE_SECONDS)
        os._exit(_exit_code(error))


def follows(error: BaseException) -> bool:
    """Whether an error may be what another rank's failure looks like from here: a sentence for all ranks, or a lost connection."""
    if isinstance(error, (UserError, Stopped, KeyboardInterrupt, dist.DistError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer"))


def _exit_code(error: BaseException) -> int:
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_STOPPED if isinstance(error, Stopped) else EXIT_FAILURE


def claim_word() -> bool:
    """Whether this rank is the first of the job to fail. A store that is gone belonged to a rank that failed before."""
    rank = str(dist.get_rank())
    try:
        return dist.distributed_c10d._get_default_store().compare_set(_KEY, "", rank).decode() == rank
    except Exception:
        return False
