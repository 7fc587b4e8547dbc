"""The two ways a run ends early for a reason that the user should read.

Both carry one clear sentence. Scripts print it to stderr and leave with ``exit_code``; library users
catch them as the built-in exceptions they derive from.
"""


class UsageError(ValueError):
    """The call is wrong: unknown, contradictory or impossible options."""

    exit_code = 2


class FaultError(RuntimeError):
    """The call is right, but something else is wrong: a damaged file, a full disk, a loss that turned NaN."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """First line of what an error says, or its name if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
