"""Entry scripts: parse, build, run, close."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from oat_dist.errors import PREEMPTED_EXIT_CODE, PreemptedError, UserError

# How gloo and NCCL say that a rank they were talking to has ended.
_GONE = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s: one line instead of the usage and one."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and leaving."""
        raise UserError(message)


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Run an entry script's main with the command line; its exit code says how it ended.

    A `UserError`, and a disk that is full or read-only, become one line on standard error (of the main rank) and exit
    code 2; a run that a signal ended leaves one line and exit code 75; one that lost a rank leaves one line of each of
    the others and exit code 1; anything else is a fault of ours and keeps its traceback. The `--local_rank=N` that
    DeepSpeed's launcher inserts is dropped: the rank is in the environment.
    """
    kind, code = "error: ", 2
    argv = [a for a in sys.argv[1:] if not a.startswith("--local_rank=")]
    try:
        main(argv)
    except UserError as error:
        message = str(error)
    except PreemptedError as error:
        kind, message, code = "", str(error), PREEMPTED_EXIT_CODE
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        message = f"{error.filename or 'a file'}: {error.strerror}; make room, then the same command goes on"
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _GONE):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"error: rank {rank}: another rank is gone; the same command goes on", file=sys.stderr)
        sys.exit(1)
    else:
        return
    if os.environ.get("RANK", "0") == "0":
        print(f"{kind}{message}", file=sys.stderr)
    sys.exit(code)
