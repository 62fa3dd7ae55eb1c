"""Training from a configuration to a run folder: file -> loader -> condition -> attack -> forward -> loss -> engine."""

import gc
import pathlib
from dataclasses import asdict

from oat_dist import data as data_sets
from oat_dist import report
from oat_dist.boards import require_boards
from oat_dist.checkpoint import Checkpoint
from oat_dist.compilation import require_compiler
from oat_dist.config import Config
from oat_dist.data import PreparedData, TrainLoader
from oat_dist.data.sources import SOURCES
from oat_dist.distributed import World
from oat_dist.evaluation import EvaluationAttack, Plan
from oat_dist.guard import needs_validation
from oat_dist.interruption import StopSignals, stop_signals
from oat_dist.losses import robust_term
from oat_dist.models import model_channels
from oat_dist.resume import RunLock, open_run, rewind
from oat_dist.training import AfterEpoch, Training


def train(
    config: Config, world: World, after_epoch: AfterEpoch | None = None, *, ends_process: bool = False
) -> pathlib.Path:
    """Train one network and measure its curve, or go on with an unfinished run of the same settings.

    Args:
        config: Everything about the run.
        world: The ranks, from `oat_dist.engine.init_world`; they may have trained other runs before.
        after_epoch: Called after every epoch; what it raises ends the training, which can be gone on with.
        ends_process: The caller lets a `PreemptedError` end the process; signals that follow are then ignored.

    Returns:
        The run folder.

    Raises:
        UserError: The configuration asks for something that is not there or cannot be.
        NonFiniteError: A loss or a weight stopped being finite; on every rank.
        PreemptedError: A signal ended the run, which can be gone on with.
    """
    with stop_signals(world, ends_process=ends_process) as signals:
        return _train(config, world, signals, after_epoch)


def _train(config: Config, world: World, signals: StopSignals, after_epoch: AfterEpoch | None) -> pathlib.Path:
    robust_term(config)
    require_boards(config)
    model_channels(config.model)
    if config.engine.compile:
        require_compiler(world.device)
    data, extra = world.on_main(lambda: open_all_data(config))
    loader = TrainLoader(data, config, rank=world.rank, ranks=world.ranks, device=world.device)
    lock = RunLock()
    run, checkpoint = world.on_main(lambda: open_run(config, data, world.ranks, lock, extra=extra))
    try:
        training = _trained(config, data, loader, world, signals, run, checkpoint, after_epoch)
        cfg = config.evaluation
        report.measure(
            training.finish(),
            data,
            Plan(lambdas=cfg.lambdas, attack=EvaluationAttack.of(config), seed=config.seed),
            config=config,
            split=cfg.split,
            batch_size=cfg.batch_size,
            world=world,
            stem=run / "frontier",
            more={"collapse": asdict(training.collapse)} if training.collapse else None,
        )
    finally:
        lock.release()
    return run


def open_data(config: Config) -> PreparedData:
    """The data set of a configuration; one that comes with the installation is prepared on first use.

    Raises:
        UserError: It is not there, or lacks what the run needs.
    """
    name, root = config.data.dataset, config.data.root
    if name in SOURCES and not (pathlib.Path(root) / name / "dataset.json").exists():
        data = data_sets.prepare(root, name)
    else:
        data = data_sets.open_prepared(root, name)
    validates = config.evaluation.interval_epochs or needs_validation(config, data)
    splits = {"train", config.evaluation.split} | ({"val"} if validates else set())
    for split in sorted(splits):
        data.file(split, config.data.loader)
    return data


def open_all_data(config: Config) -> tuple[PreparedData, PreparedData | None]:
    """As `open_data`, with the data set of `data.extra`."""
    data = open_data(config)
    extra = data_sets.open_extra(data, config.data)
    if extra is not None:
        extra.file("train", config.data.loader)
    return data, extra


def _trained(
    config: Config, data: PreparedData, loader: TrainLoader, world: World, signals: StopSignals, run: pathlib.Path,
    checkpoint: Checkpoint | None, after_epoch: AfterEpoch | None,
) -> Training:  # fmt: skip
    """Train to the end; after a collapse anew from the last good checkpoint, as a run that is resumed there."""
    training = Training(config, data, loader, world=world, run=run, checkpoint=checkpoint, signals=signals)
    if training.fit(after_epoch):
        return training
    # Two networks need not fit into memory; DeepSpeed's engine is part of reference cycles.
    del training
    gc.collect()
    checkpoint = world.on_main(lambda: rewind(run, keep=config.checkpoint.keep, whole_epochs=True))
    return _trained(config, data, loader, world, signals, run, checkpoint, after_epoch)
