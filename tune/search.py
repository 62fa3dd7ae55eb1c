"""Search lambda distribution, encoding and more for the network that comes closest to the dedicated frontier.

    python tune/search.py                                                          the digits, on this machine
    python tune/search.py --config tune/configs/cifar10.yaml --address HOST:PORT   on a Ray cluster
    python tune/search.py --search.trials=32 --optim.epochs=20                     any setting of search and training
    python tune/search.py --resume [FOLDER]                                        go on after a kill or Ctrl-C

Dedicated networks are trained first, or taken from where they are. Choices are made on validation; the chosen
configuration is trained with several seeds and reported on test. tune/phases.py says what is written where.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from launch import ArgumentParser, run_main
from oat_dist.config import to_dict
from oat_dist.config_io import load_config
from oat_dist.errors import UserError
from tune.settings import SearchRun

DEFAULT_CONFIG = pathlib.Path(__file__).parent / "configs/digits.yaml"
_ALIASES = ("workers-per-trial", "cpus-per-worker", "gpus-per-worker")
# May differ when a search goes on: where it runs.
_PLACE = ("workers_per_trial", "cpus_per_worker", "gpus_per_worker", "retries")


def main(argv: Sequence[str]) -> None:
    """Parse, check, search, say where the results are."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, add_help=False)
    add = parser.add_argument
    add("--address", help="HOST:PORT of a Ray cluster, or auto; default: a cluster of this machine, on 127.0.0.1")
    add("--frontier", type=pathlib.Path, help="file of launch/frontier.py --split val; default: train what is missing")
    add("--resume", nargs="?", const="auto", help="go on with a search: its folder, or the newest of these settings")
    for name in _ALIASES:
        add(f"--{name}", help=f"the same as --search.{name.replace('-', '_')}")
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        print("\nAll other settings:\n")
    args, rest = parser.parse_known_args(argv)
    rest += [f"--search.{name.replace('-', '_')}={value}" for name in _ALIASES
             if (value := getattr(args, name.replace("-", "_"))) is not None]  # fmt: skip
    run, folder = choose_search(rest, args.resume)
    if args.address is None:
        # Ray reads it when it is imported; with its default it would listen on the machine's outer address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # A mistake in the configuration is answered before the seconds that these imports take.
    from tune.phases import Interrupted, Search

    search = Search(run, folder, args.frontier)
    try:
        folder = search.go(args.address)
    except (Interrupted, KeyboardInterrupt):
        where = f"; python tune/search.py --resume {search.folder} goes on" if search.folder else ""
        print(f"interrupted{where}", file=sys.stderr)
        sys.exit(130)
    print(f"{folder}/best.yaml: deepspeed launch/train.py --config {folder}/best.yaml")


def choose_search(argv: Sequence[str], resume: str | None) -> tuple[SearchRun, pathlib.Path | None]:
    """The configuration, and the folder of the search to go on with, or None for a new one.

    Args:
        argv: Settings of the command line.
        resume: None, a folder, or `auto`.

    Raises:
        UserError: A mistake in the settings, or nothing to go on with.
    """
    if resume not in (None, "auto"):
        folder = pathlib.Path(resume).absolute()
        if not (folder / "search.yaml").is_file():
            raise UserError(f"--resume {resume}: not a search (no search.yaml); name a folder that a search made")
        run = load_config(["--config", str(folder / "search.yaml"), *argv], cls=SearchRun)
        if _what(run) != _what(load_config(["--config", str(folder / "search.yaml")], cls=SearchRun)):
            raise UserError(f"--resume {resume}: goes on with its own settings; leave {' '.join(argv)} out")
        return run, folder
    given = any(argument.partition("=")[0] == "--config" for argument in argv)
    run = load_config([*([] if given else ["--config", str(DEFAULT_CONFIG)]), *argv], cls=SearchRun)
    if resume is None:
        return run, None
    for folder in sorted(pathlib.Path(run.output_dir).absolute().glob(f"*_{run.name}_search"), reverse=True):
        if (folder / "search.yaml").is_file() and not (folder / "report.json").exists():
            theirs = load_config(["--config", str(folder / "search.yaml")], cls=SearchRun)
            if _what(theirs) == _what(run):
                return run, folder
    raise UserError(f"--resume: no unfinished search of these settings in {run.output_dir}")


def _what(run: SearchRun) -> dict:
    settings = to_dict(run)
    for key in _PLACE:
        del settings["search"][key]
    return settings


if __name__ == "__main__":
    run_main(main)
