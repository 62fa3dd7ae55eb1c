"""The exceptions that are no fault of ours: a mistake of the user's, and a signal to end."""


class UserError(ValueError):
    """Bad input: a single line that names the key, file or argument and what would be right.

    Entry scripts print it without a traceback and exit with code 2.
    """


class NonFiniteError(UserError):
    """Training met a loss, gradient or weight that is not finite, and stopped; the settings ask for too much."""

    step: int | None = None
    """The first bad step, where it is known."""


class PreemptedError(Exception):
    """A signal asked the run to end, and it did, with all that is needed to go on.

    Entry scripts print it and exit with `PREEMPTED_EXIT_CODE`, on which a batch job is put back into its queue.
    """


PREEMPTED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the failure is temporary, the same command may be tried again."""


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise UserError("key=value: expected") unless `condition` holds."""
    if not condition:
        raise UserError(f"{key}={value!r}: {expected}")
