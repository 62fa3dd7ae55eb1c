"""Entry scripts: parse, build, run, close."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from oat_dist.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s: one line instead of the usage and one."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and leaving."""
        raise UserError(message)


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Run an entry script's main with the command line.

    A `UserError` becomes one line on standard error (of the main rank) and exit code 2; anything else is a fault of
    ours and keeps its traceback. The `--local_rank=N` that DeepSpeed's launcher inserts is dropped: the rank is in the
    environment.
    """
    argv = [a for a in sys.argv[1:] if not a.startswith("--local_rank=")]
    try:
        main(argv)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
