"""Ray: start or join a cluster, and run jobs on it as trials of Ray Tune. The only file that imports ray.

With one worker per trial the job runs in the trial's own process, which later trials use again. With more, the trial is
a driver without a CPU of its own that starts Ray Train's TorchTrainer, so that its workers may be on several nodes.
Which trial runs where and when is left to Ray.
"""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import train as ray_train
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from oat_dist.config import Config
from oat_dist.engine import init_world
from oat_dist.errors import UserError
from tune.settings import SearchConfig
from tune.trial import run_job

ADDRESS_TIMEOUT_S = 30
_OBJECT_STORE_BYTES = 200 * 2**20
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_AIR_NEW_OUTPUT": "0",
          "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": "1",
          "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
          "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What the cluster gives the trials."""

    concurrent: int
    """Trials at a time."""
    cpus: int
    """CPUs of each worker."""
    gpus: float
    """GPUs of each worker."""
    workers: int
    """Workers of each trial."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one job."""

    trial: str
    """Ray's name of the trial."""
    job: dict
    """The job, with its sample."""
    status: str
    """`finished`, `stopped` (early), `failed` or `unfinished` (interrupted)."""
    metrics: dict
    """Last metrics reported; empty when there are none."""
    error: str | None = None
    """Of a failed one: what went wrong, on one line."""
    history: tuple[tuple[int, float], ...] = ()
    """(epoch, frontier ratio) of every report of a search job."""


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A Ray cluster for the time of the block: the one at an address, or one of this machine on 127.0.0.1.

    Raises:
        UserError: Nothing answers at the address.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # "local": without it Ray would join any other cluster of this machine.
        ray.init("local", _node_ip_address="127.0.0.1", num_cpus=len(os.sched_getaffinity(0)),
                 object_store_memory=_OBJECT_STORE_BYTES, **quiet)  # fmt: skip
    else:
        del quiet["include_dashboard"]
        if address != "auto":
            _require_answer(address)
        try:
            ray.init(address=address, **quiet)
        except ConnectionError:
            raise UserError(f"--address {address}: no Ray cluster runs here; give HOST:PORT of its head") from None
    try:
        yield
    finally:
        ray.shutdown()


def find_slots(cfg: SearchConfig) -> Slots:
    """How many trials the cluster runs at a time.

    Raises:
        UserError: No node has what one worker needs, or all together cannot run one trial.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has_gpus = any(node.get("GPU", 0) for node in nodes)
    gpus = float(has_gpus) if cfg.gpus_per_worker is None else cfg.gpus_per_worker
    per_node = []
    for node in nodes:
        fitting = int(node.get("CPU", 0) // cfg.cpus_per_worker)
        per_node.append(min(fitting, int(node.get("GPU", 0) / gpus + 1e-9)) if gpus else fitting)
    if not any(per_node):
        largest = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        wanted = f"search.cpus_per_worker={cfg.cpus_per_worker} with {gpus:g} GPUs"
        raise UserError(f"{wanted}: no node has that; the nodes have {largest}")
    if sum(per_node) < cfg.workers_per_trial:
        raise UserError(
            f"search.workers_per_trial={cfg.workers_per_trial}: the cluster has room for {sum(per_node)} workers of "
            f"{cfg.cpus_per_worker} CPUs and {gpus:g} GPUs"
        )
    concurrent = sum(per_node) // cfg.workers_per_trial
    return Slots(concurrent=concurrent, cpus=cfg.cpus_per_worker, gpus=gpus, workers=cfg.workers_per_trial)


def run_jobs(
    name: str, jobs: Sequence[dict] | Callable, *, folder: pathlib.Path, base: Config, dedicated: Sequence[dict],
    cfg: SearchConfig, slots: Slots, on_event: Callable[[str, str, dict, dict], None], sampler: Any = None,
) -> list[Outcome]:  # fmt: skip
    """Run jobs as the trials of one Tune experiment, or go on with it where it was left.

    Args:
        name: Of the experiment; a folder in `folder`.
        jobs: The jobs; or a function that suggests samples of a search job to an Optuna trial.
        folder: Of the search, absolute.
        base: The run that trials start from.
        dedicated: Mean points of the dedicated networks; empty while these are trained.
        cfg: Of the search.
        slots: From `find_slots`.
        on_event: Called with (trial, event, job, metrics); event is started, reported, finished or failed.
        sampler: Optuna's sampler, for a function.

    Returns:
        What became of every job that was begun, in the order of the trials.
    """
    common = {"base": base, "dedicated": list(dedicated), "interval_epochs": cfg.interval_epochs, "slots": slots}
    one_process = slots.workers == 1
    trainable = tune.with_parameters(
        _one_process if one_process else _many_processes, common=common, storage=str(folder / "ray")
    )
    # A driver takes no CPU; Tune wants it to take something, so it takes a byte of memory.
    resources = {"CPU": slots.cpus, "GPU": slots.gpus} if one_process else {"CPU": 0, "memory": 1}
    trainable = tune.with_resources(trainable, resources)
    is_search = name == "search"
    stops = is_search and cfg.early_stopping and cfg.objective == "ratio"
    scheduler = ASHAScheduler(time_attr="epoch", metric="ratio", mode="max", max_t=base.optim.epochs,
                              grace_period=cfg.grace_epochs, reduction_factor=cfg.reduction)  # fmt: skip
    tuner_folder = folder / "ray" / name
    _Events.listener = on_event
    if is_search and tune.Tuner.can_restore(str(tuner_folder)):
        tuner = tune.Tuner.restore(str(tuner_folder), trainable=trainable)
    else:
        suggests = callable(jobs)
        tuner = tune.Tuner(
            trainable,
            param_space={} if suggests else {"job": tune.grid_search(list(jobs))},
            tune_config=tune.TuneConfig(
                num_samples=cfg.trials if suggests else 1,
                search_alg=_suggestions(jobs, cfg, sampler) if suggests else None,
                scheduler=scheduler if stops else None,
                max_concurrent_trials=slots.concurrent,
                reuse_actors=one_process,
                trial_dirname_creator=_trial_id,
            ),
            run_config=tune.RunConfig(
                name=name, storage_path=str(folder / "ray"), verbose=0, callbacks=[_Events(), JsonLoggerCallback()],
                failure_config=tune.FailureConfig(max_failures=cfg.retries),
            ),
        )  # fmt: skip
    return [_outcome(result, base) for result in tuner.fit()]


def _suggestions(space: Callable, cfg: SearchConfig, sampler: Any) -> OptunaSearch:
    """Optuna in the place of a list of jobs, for the one number or the two that the search is to raise."""
    if cfg.objective == "ratio":
        return OptunaSearch(space=space, metric="ratio", mode="max", sampler=sampler)
    return OptunaSearch(space=space, metric=["sa_mean", "ra_mean"], mode=["max", "max"], sampler=sampler)


def _trial_id(trial: Any) -> str:
    return trial.trial_id


def _one_process(config: dict, *, common: dict, storage: str) -> None:
    """A trial that is one process: the job, here."""
    del storage
    _run(_own_folder(config["job"]), common, init_world(common["slots"].cpus), tune.report)


def _many_processes(config: dict, *, common: dict, storage: str) -> None:
    """A trial of several processes: this one waits, Ray Train's workers do the job."""
    slots = common["slots"]
    resources = {"CPU": slots.cpus, **({"GPU": slots.gpus} if slots.gpus else {})}
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": _own_folder(config["job"]), "common": common},
        scaling_config=ray_train.ScalingConfig(
            num_workers=slots.workers, use_gpu=slots.gpus > 0, resources_per_worker=resources
        ),
        run_config=ray_train.RunConfig(
            name=f"workers-{tune.get_context().get_trial_id()}", storage_path=storage, callbacks=[TuneReportCallback()]
        ),
    )
    trainer.fit()


def _worker(config: dict) -> None:
    """One rank of a trial; Ray Train has made the process group and its variables."""
    common = config["common"]
    _run(config["job"], common, init_world(common["slots"].cpus), ray_train.report)


def _own_folder(job: dict) -> dict:
    """The job, writing into a folder of this trial: two trials at a time may have the same sample."""
    if job["kind"] != "search":
        return job
    return {**job, "folder": f"{job['folder']}/{tune.get_context().get_trial_id()}"}


def _run(job: dict, common: dict, world: Any, report: Callable[[dict], None]) -> None:
    arguments = {key: common[key] for key in ("dedicated", "interval_epochs")}
    run_job(job, common["base"], world=world, report=report, **arguments)


class _Events(tune.Callback):
    """Passes what happens to trials on. Tune pickles it with the experiment, so it holds nothing itself."""

    listener: Callable[[str, str, dict, dict], None] | None = None

    def _tell(self, *event: Any) -> None:
        if _Events.listener is not None:
            _Events.listener(*event)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._tell(trial.trial_id, "started", trial.config["job"], {})

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        self._tell(trial.trial_id, "reported", trial.config["job"], result)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._tell(trial.trial_id, "finished", trial.config["job"], trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._tell(trial.trial_id, "failed", trial.config["job"], trial.last_result or {})


def _outcome(result: Any, base: Config) -> Outcome:
    """A Tune result in our words."""
    # A trial that failed before its first report has no configuration in its result, but in its folder.
    trial_folder = pathlib.Path(result.path)
    job = json.loads((trial_folder / "params.json").read_text())["job"]
    metrics, history = dict(result.metrics or {}), ()
    if job["kind"] == "search" and result.metrics_dataframe is not None and "ratio" in result.metrics_dataframe:
        frame = result.metrics_dataframe.dropna(subset=["ratio"]).drop_duplicates("epoch", keep="last")
        history = tuple((int(epoch), float(ratio)) for epoch, ratio in zip(frame["epoch"], frame["ratio"], strict=True))
    is_whole = "points" in metrics and (job["kind"] != "search" or metrics["epoch"] >= base.optim.epochs)
    status = (
        "failed" if result.error else "finished" if is_whole else "stopped" if metrics.get("done") else "unfinished"
    )
    error = _one_line(result.error) if result.error else None
    return Outcome(trial=trial_folder.name, job=job, status=status,
                   metrics=metrics if "points" in metrics else {}, error=error, history=history)  # fmt: skip


def _one_line(error: BaseException) -> str:
    """The last line of a traceback: what was raised in the trial."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _require_answer(address: str) -> None:
    """Ask a cluster whether it lives, with a time limit: `ray.init` itself would wait for minutes."""
    message = (
        f"--address {address}: no Ray cluster answers there within {ADDRESS_TIMEOUT_S} s; give HOST:PORT of its head"
    )
    try:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=ADDRESS_TIMEOUT_S).close()
        # In a process of its own, because nothing else can end its waiting.
        ask = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
        command = [sys.executable, "-c", ask, address]
        subprocess.run(command, capture_output=True, timeout=ADDRESS_TIMEOUT_S, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        raise UserError(message) from None
