"""How every entry point starts and ends: flags go in through `sys.argv`, an exit code comes out.

`tyro` already reads `--save-path` and `--save_path` alike. This helper adds the other half of the command-line contract: a user's
mistake is one sentence on stderr and a non-zero exit code; the traceback is shown with `--debug` only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from seqloom.errors import EXIT_STOPPED, EXIT_USER_ERROR, Stopped, UserError

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # as if ended by SIGPIPE: what a shell expects where `head` has read enough


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and leave the process with its exit code (None is 0).

    `--debug` may stand anywhere among the flags; it is taken out of `sys.argv` before `main` reads them. With it every error keeps its
    traceback. Without it a `UserError` ends in `error: <sentence>` and exit code 2, Ctrl-C in exit code 130, and a reader
    of our output that is gone in 141 without a word. A run that was asked to stop says its sentence and ends in exit code 75. Errors that
    are no mistake of the user's are never hidden.
    """
    debug = "--debug" in sys.argv[1:]
    if debug:
        sys.argv.remove("--debug")
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        sys.exit(EXIT_BROKEN_PIPE)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        if debug:
            raise
        print("error: interrupted before the end", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code or 0)
