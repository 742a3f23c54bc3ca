"""Exceptions with an exit code; the message is one line that names the key, the value and the fix."""


class UserError(Exception):
    """The request cannot be met: a wrong key, value, file or folder. The command exits with code 2."""

    exit_code = 2


class RunError(UserError):
    """The run failed: a non-finite loss, a full disk. The command exits with code 1."""

    exit_code = 1
