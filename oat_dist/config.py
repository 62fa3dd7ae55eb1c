"""The configuration of a run: all sections, the checks between them, and what names a run.

Standard library only, nothing is read and no device is touched. `config_io.py` fills the tree from YAML and the command
line; the settings themselves are in `settings.py`, `network_settings.py` and `running_settings.py`.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace

from oat_dist.errors import require
from oat_dist.network_settings import PAPER_LAMBDAS, ConditioningConfig, ModelConfig
from oat_dist.running_settings import CheckpointConfig, EngineConfig, LoggingConfig
from oat_dist.settings import (
    AttackConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    OptimConfig,
    default_step_size,
)

__all__ = [
    "DEFAULTS_VERSION",
    "PAPER_LAMBDAS",
    "AttackConfig",
    "CheckpointConfig",
    "ConditioningConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "computed_settings",
    "default_step_size",
    "fingerprint",
    "of_one_width",
    "to_dict",
]


DEFAULTS_VERSION = 1
"""To be raised when the default of a setting changes: runs are named by the settings that differ from the defaults."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, complete."""

    name: str = "oat"
    """Name of the run; part of its folder's name."""
    seed: int = 0
    """Seed of initialisation, data order, lambda, augmentation and random starts."""
    output_dir: str = "runs"
    """Folder that holds the run folders."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which images, and how they are read."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Which network."""
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    """How lambda is drawn and how the network is told about it."""
    attack: AttackConfig = field(default_factory=AttackConfig)
    """The attack of training."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The objective."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser, schedule and averaging."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How a step is spread over memory and ranks."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The measurement at the end of a run."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is reported while a run goes on."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What survives when a run is killed."""

    def __post_init__(self) -> None:
        """Check names and the combinations that concern more than one section."""
        ok = bool(self.name) and all(c.isalnum() or c in "-_.+" for c in self.name)
        require(ok, "name", self.name, "must be letters, digits and -_.+ only (it names a folder)")
        require(0 <= self.seed < 2**31, "seed", self.seed, "must lie in [0, 2^31)")
        expected = f"must be at least engine.accumulation={self.engine.accumulation}"
        require(self.optim.batch_size >= self.engine.accumulation, "optim.batch_size", self.optim.batch_size, expected)
        ok = not self.loss.distill_widths or len(self.model.widths) > 1
        require(ok, "loss.distill_widths", self.loss.distill_widths, "needs several model.widths")
        weights = self.loss.width_weights
        expected = f"must be one number for each of the {len(self.model.widths)} model.widths"
        require(weights is None or len(weights) == len(self.model.widths), "loss.width_weights", weights, expected)
        ok = not self.optim.awp_gamma or len(self.model.widths) == 1
        require(ok, "optim.awp_gamma", self.optim.awp_gamma, "must be 0 with several model.widths")
        ok = self.optim.optimizer != "muon" or self.engine.zero_stage == 0
        expected = "must be 0 with optim.optimizer=muon, which needs whole matrices on every rank"
        require(ok, "engine.zero_stage", self.engine.zero_stage, expected)
        ok = self.loss.self_distillation == 0 or self.conditioning.mass_at_zero > 0
        expected = "needs lambda = 0 in training, which is the teacher"
        require(ok, "loss.self_distillation", self.loss.self_distillation, expected)
        expected = "needs conditioning.kind=float; nothing else draws noise"
        ok = self.evaluation.noise_draws is None or self.conditioning.kind == "float"
        require(ok, "evaluation.noise_draws", self.evaluation.noise_draws, expected)
        expected = f"must leave data.dataset at least one of the optim.batch_size={self.optim.batch_size} images"
        require(self.num_extra < self.optim.batch_size, "data.extra_share", self.data.extra_share, expected)
        ok = self.attack.early_share == 0 or self.num_early_epochs >= 1
        expected = f"must be at least one of optim.epochs={self.optim.epochs}"
        require(ok, "attack.early_share", self.attack.early_share, expected)

    @property
    def num_extra(self) -> int:
        """Images of `data.extra` in every global batch: ceil(data.extra_share * optim.batch_size), or 0 without it."""
        if self.data.extra is None:
            return 0
        # Rounded first: a product a little above a whole number is that number.
        return math.ceil(round(self.data.extra_share * self.optim.batch_size, 9))

    def width_weight(self, width: float) -> float:
        """What the loss of one of `model.widths` counts in the sum of a step."""
        weights = self.loss.width_weights
        return 1.0 if weights is None else weights[self.model.widths.index(width)]

    @property
    def num_early_epochs(self) -> int:
        """First epochs whose attack has `attack.early_steps`: the whole ones within `attack.early_share` of the run."""
        return int(round(self.attack.early_share * self.optim.epochs, 9))

    def steps_per_epoch(self, num_images: int) -> int:
        """Optimiser steps in a pass over a training split.

        Args:
            num_images: Images of the training split of `data.dataset`; those of an incomplete batch are left out.
        """
        return num_images // (self.optim.batch_size - self.num_extra)


def to_dict(config: Config) -> dict:
    """The configuration as nested plain dictionaries and lists, as YAML and JSON hold it."""
    return json.loads(json.dumps(asdict(config)))


def of_one_width(config: Config) -> Config:
    """A configuration without the widths below 1, and what only they have."""
    model = replace(config.model, widths=(1.0,), width_rule="all", width_heads=False)
    return replace(config, model=model, loss=replace(config.loss, distill_widths=False, width_weights=None))


def computed_settings(config: Config) -> dict[str, object]:
    """Dotted key -> value of the settings that decide what is computed.

    Left out are names, folders, how often something is logged or saved, time limits, and what makes no difference
    beyond rounding: loader, threads, overlap, and whether a CUDA graph is recorded. Running statistics are averaged
    over ranks at every checkpoint, but a run on one rank, or with shared statistics, is the same with any interval.
    """
    settings = to_dict(config)
    for key in ("name", "output_dir", "logging", "checkpoint"):
        del settings[key]
    for key in ("root", "loader", "workers"):
        del settings["data"][key]
    for key in ("threads", "cuda_graph", "overlap_comm", "hang_timeout_s"):
        del settings["engine"][key]
    flat = {}
    for key, value in settings.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def fingerprint(config: Config) -> str:
    """Eight hexadecimal digits that name what is computed.

    Settings that have their default take no part, so that a run is still found when newer code has more settings.
    """
    default = computed_settings(Config())
    settings = {key: value for key, value in computed_settings(config).items() if value != default[key]}
    text = json.dumps([DEFAULTS_VERSION, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
