"""Where metrics are shown beside the files of a run: TensorBoard, Weights & Biases. Nothing else imports wandb."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from oat_dist.config import Config, to_dict
from oat_dist.errors import require


class Board(Protocol):
    """Shows values over steps."""

    def show(self, values: Mapping[str, float], step: int) -> None:
        """Show name -> value at a step."""

    def close(self) -> None:
        """Write what is left."""


def require_boards(config: Config) -> None:
    """Refuse a board that is not installed, before anything is written.

    Raises:
        UserError: With what to install.
    """
    ok = not config.logging.wandb or importlib.util.find_spec("wandb") is not None
    require(ok, "logging.wandb", True, "wandb is not installed; pip install 'oat-dist[wandb]'")


def open_boards(config: Config, run: pathlib.Path) -> list[Board]:
    """The boards that a configuration asks for.

    Args:
        config: Configuration of the run.
        run: Its folder, in which boards keep their files.
    """
    boards: list[Board] = []
    if config.logging.tensorboard:
        boards.append(_TensorBoard(run))
    if config.logging.wandb:
        boards.append(_WandB(config, run))
    return boards


class _TensorBoard:
    def __init__(self, run: pathlib.Path) -> None:
        self._writer = SummaryWriter(str(run / "tensorboard"))

    def show(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """One W&B run per run folder: it goes on under the same id. Its own variables apply, e.g. WANDB_MODE=offline."""

    def __init__(self, config: Config, run: pathlib.Path) -> None:
        import wandb

        self._run = wandb.init(project=f"oat-{config.data.dataset.replace('/', '-')}", name=run.name, id=run.name,
                               resume="allow", dir=str(run), config=to_dict(config), save_code=False)  # fmt: skip

    def show(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
