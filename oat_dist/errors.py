"""The one exception that stands for a mistake of the user's."""


class UserError(ValueError):
    """Bad input: a single line that names the key, file or argument and what would be right.

    Entry scripts print it without a traceback and exit with code 2.
    """


class NonFiniteError(UserError):
    """Training met a loss or a weight that is not finite, and stopped; the settings ask for too much."""


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise UserError("key=value: expected") unless `condition` holds."""
    if not condition:
        raise UserError(f"{key}={value!r}: {expected}")
