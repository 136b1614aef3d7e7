"""The one exception that a user's mistake ends in.

Every room raises `UserError` with a single sentence that names what is wrong, where, and what to do. The entry points print
the sentence and leave with `EXIT_USER_ERROR`; the traceback is shown with `--debug` only.
"""

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake that the user can mend: the message is one sentence with the fix in it."""
