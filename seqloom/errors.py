"""The exceptions that end a program in a sentence: a user's mistake, and a run that was asked to stop.

Every room raises `UserError` with a single sentence that names what is wrong, where, and what to do. The entry points print
the sentence and leave with `EXIT_USER_ERROR`; the traceback is shown with `--debug` only.
"""

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, run it again


class UserError(Exception):
    """A mistake that the user can mend: the message is one sentence with the fix in it."""


class Stopped(Exception):
    """A run was asked to stop and did, with everything saved: the message says how to go on. No error, but not the end either."""
