"""Every objective, dedicated and once-for-all, on one recipe: SA, RA, seconds and images per second in one table.

    python benchmarks/objectives.py [--objectives trades mart] [--modes dedicated once_for_all] [--docs]
    python benchmarks/objectives.py --config launch/configs/cifar10_8k_wrn10_2.yaml --objectives pgd_at trades mart \
        --modes once_for_all --docs [--section.field=value ...]

"dedicated" is the objective alone (lambda = 1, no FiLM, one norm), "once_for_all" the same configuration with its own
conditioning; a standard network (lambda = 0 alone) stands in the first row. Attacks are those of the papers at the eps
of the configuration; so are settings, except those of `--settings llr.weight=0.2 ...`. An objective that needs extra
data gets half of the training images with their labels, and the other half with those that a standard network trained
on the first half gives them: such a row sees half the labels. A run that is there already is not trained again, so the
same command goes on. Writes benchmarks/results/objectives_<name of the configuration>.csv.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from table import RESULTS, describe, environment, markdown, put_into_docs, save
from trained import images_per_s, trained, training_seconds

from launch import prepare_data, pseudo_label
from oat_dist.config import fingerprint
from oat_dist.config_io import load_config
from oat_dist.data import PreparedData
from oat_dist.dedicated import measure_run
from oat_dist.distributed import World
from oat_dist.engine import init_world
from oat_dist.errors import UserError
from oat_dist.evaluation import EvaluationAttack
from oat_dist.losses import ROBUST, find_objective, require_setting
from oat_dist.trainer import open_data

MODES = ("dedicated", "once_for_all")
LAMBDAS = (0.0, 0.2, 1.0)
# A fifth of the pixel range, half the learning rate: at 0.25 and 0.4, MART alone stays at guessing in 20 epochs.
DIGITS = (
    "--config=launch/configs/digits.yaml",
    "--data.loader=memory",
    "--attack.eps_255=51",
    "--optim.lr=0.2",
    "--evaluation.lambdas=[0.0,0.2,1.0]",
)
# The paper's weights, made for eps = 8/255, leave nothing but a constant network at this eps.
DIGITS_SETTINGS = ("llr.weight=0.2",)


def settings_of(objective: str, mode: str, own: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Settings that make a run of the table from the common configuration.

    Args:
        objective: One of `oat_dist.losses.ROBUST`.
        mode: One of `MODES`.
        own: Settings of the objective that are not its paper's.
    """
    settings: dict[str, Any] = {"loss.robust": objective}
    settings |= {f"loss.settings.{name}": value for name, value in (own or {}).items()}
    if mode == "once_for_all":
        return settings
    settings |= alone(1.0)
    # The objective as published has no clean images where its loss has none.
    return settings | {"loss.clean_at_one": bool(ROBUST[objective].needs & {"clean_logits", "input_gradient"})}


def alone(lam: float) -> dict[str, Any]:
    """Settings of a network of one lambda, without conditioning."""
    told = {"conditioning.lambdas": [lam], "conditioning.weights": None, "conditioning.film": "none"}
    return told | {"conditioning.norm": "single", "evaluation.lambdas": [lam]}


def own_settings(texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Objective -> setting -> value, from OBJECTIVE.NAME=VALUE.

    Raises:
        UserError: A text of another form, or an objective or setting that does not exist.
    """
    found: dict[str, dict[str, float]] = {}
    for text in texts:
        key, _, value = text.partition("=")
        objective, _, name = key.partition(".")
        try:
            number = float(value)
        except ValueError:
            raise UserError(f"--settings {text}: expected OBJECTIVE.NAME=VALUE, e.g. llr.weight=0.2") from None
        require_setting(f"loss.settings.{name}")
        found.setdefault(find_objective(objective).name, {})[name] = number
    return found


class Table:
    """Runs of one recipe, trained where they are missing."""

    def __init__(self, argv: Sequence[str], world: World) -> None:
        """Read the recipe.

        Args:
            argv: Arguments of `load_config`.
            world: This process.
        """
        self.argv, self.world = list(argv), world
        self.base = load_config(self.argv)

    def row(self, objective: str, mode: str, settings: Mapping[str, Any], note: str = "") -> dict[str, object]:
        """Train and measure one network, or read what was measured."""
        config = load_config(self.argv, {"name": f"{self.base.name}-{objective}-{mode}", **settings})
        data = open_data(config)
        run, lambdas = trained(config, data, self.world), config.evaluation.lambdas
        attack = EvaluationAttack.of(config)
        points = measure_run(run, lambdas, attack, data=data, split="test", world=self.world)
        row: dict[str, object] = {"objective": objective, "mode": mode, "settings": note}
        for lam in LAMBDAS:
            point = next((p for p in points if p["lam"] == lam), {})
            for key in ("sa", "ra"):
                row[f"{key}_{lam:g}"] = round(100 * point[key], 2) if point else None
        row |= {"seconds": training_seconds(run), "images_per_s": images_per_s(run)}
        row |= {"seed": config.seed, "test_images": data.counts["test"], "fingerprint": fingerprint(config)}
        print(row, file=sys.stderr, flush=True)
        return row

    def with_half_the_labels(self) -> dict[str, Any]:
        """Data settings of a run with half of the labels: the other half are a standard network's."""
        root, name = pathlib.Path(self.base.data.root), self.base.data.dataset
        labelled, extra = f"{name}-half", f"{name}-half-extra"
        whole = open_data(self.base)
        # An archive does not know how its images may be moved.
        settings = {"data.dataset": labelled, "data.shift_pixels": whole.shift_pixels, "data.flip": whole.flip}
        if not (root / labelled / "dataset.json").exists():
            _write_half(whole, root, labelled)
        if not (root / extra / "dataset.json").exists():
            # As many steps as on all images.
            teacher = {"name": labelled, "optim.epochs": 2 * self.base.optim.epochs}
            config = load_config(self.argv, {**teacher, **settings, **alone(0.0)})
            run = trained(config, open_data(config), self.world)
            pseudo_label.main([f"--run={run}", f"--images=npz:{root / labelled}.npz", f"--name={extra}",
                               f"--out={root}"])  # fmt: skip
        return settings | {"data.extra": extra}


def _write_half(whole: PreparedData, root: pathlib.Path, name: str) -> None:
    """A data set of every second training image, and NAME.npz with the others as x_unlabeled."""
    split = {part: safetensors.numpy.load_file(whole.file(part, "memory")) for part in ("train", "val", "test")}
    x, y = split["train"]["image"], split["train"]["label"]
    archive = root / f"{name}.npz"
    np.savez(
        archive,
        x_train=np.concatenate((x[::2], split["val"]["image"])),
        y_train=np.concatenate((y[::2], split["val"]["label"])),
        x_test=split["test"]["image"],
        y_test=split["test"]["label"],
        x_unlabeled=x[1::2],
    )
    prepare_data.main([f"npz:{archive}", f"--name={name}", f"--val={whole.counts['val']}", f"--out={root}"])


def report(rows: Sequence[Mapping[str, object]], conditions: Mapping[str, object]) -> str:
    """The table and its conditions."""
    left_out = ("seed", "test_images", "fingerprint")
    text = markdown([{key: value for key, value in row.items() if key not in left_out} for row in rows])
    about = {key: rows[0][key] for key in ("seed", "test_images")}
    return f"{text}\n\n{describe({**about, **conditions})}"


def main(argv: Sequence[str]) -> None:
    """Train what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--objectives", nargs="+", choices=sorted(ROBUST), default=list(ROBUST))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--settings", nargs="+", default=[], help="OBJECTIVE.NAME=VALUE instead of the paper's")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/reproduction.md")
    parser.add_argument("--out", type=pathlib.Path, help="CSV file; default: as above")
    args, rest = parser.parse_known_args(argv)
    if not any(argument.startswith("--config") for argument in rest):
        rest, args.settings = [*DIGITS, *rest], [*DIGITS_SETTINGS, *args.settings]
    settings = own_settings(args.settings)
    threads = load_config(rest).engine.threads
    with init_world(threads) as world:
        table = Table(rest, world)
        rows = [table.row("standard", "dedicated", alone(0.0))]
        for mode in args.modes:
            for objective in args.objectives:
                more = table.with_half_the_labels() if "extra_data" in ROBUST[objective].needs else {}
                own = settings.get(objective, {})
                note = ", ".join(f"{name} {value:g}" for name, value in own.items())
                rows.append(table.row(objective, mode, settings_of(objective, mode, own) | more, note))
        conditions = environment(world.device)
    text = report(rows, conditions)
    print(text)
    save([row | conditions for row in rows], args.out or RESULTS / f"objectives_{table.base.name}.csv")
    if args.docs:
        put_into_docs(f"objectives {table.base.name}", text)


if __name__ == "__main__":
    main(sys.argv[1:])
