"""The exceptions that become exit codes; the message is one line that names the thing, the value and the remedy."""


class UserError(Exception):
    """The request cannot be met as given: a wrong key, value, file or folder. The command exits with code 2."""

    exit_code = 2


class RunError(UserError):
    """The run itself failed: a non-finite loss, a full disk. The command exits with code 1."""

    exit_code = 1
