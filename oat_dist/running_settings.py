"""The sections of a configuration that say how a run is carried out, not what is learned. Standard library only."""

import math
from dataclasses import dataclass
from typing import Literal

from oat_dist.errors import require


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is spread over memory and ranks."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs attack and training forward under bfloat16 autocast; parameters, FiLM, statistics, losses and the
    attack's iterates stay float32."""
    accumulation: int = 1
    """Micro-batches per optimiser step."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed ZeRO: 1 shards optimiser state over ranks, 2 gradients too."""
    overlap_comm: bool | None = None
    """With ZeRO 1 and 2, reduce gradients while the backward pass goes on; default: on GPUs. Without ZeRO they are
    reduced after it."""
    cuda_graph: bool = True
    """Run the attack as one recorded CUDA graph where it can be: on a GPU, with shapes that stay the same. Values are
    the same either way."""
    compile: bool = False
    """Run the network's forward through torch.compile, in training and attack; the first steps take minutes. Needs a
    C++ compiler on a CPU."""
    deterministic: bool = False
    """On a GPU, ask for algorithms that repeat a run to the last bit, and warn of operators that have none; else cuDNN
    keeps the fastest of those it tries. A CPU always repeats."""
    sync_statistics: bool = False
    """Share batch-norm statistics over ranks in every training forward."""
    threads: int = 0
    """CPU threads per rank; 0 divides the cores of the machine by the ranks on it."""
    max_bad_steps: int = 0
    """Steps with a gradient that is not finite that a run may leave out; 0 stops at the first. More than 0 makes the
    host wait for the device once per step."""
    hang_timeout_s: float = 1800
    """Seconds without progress after which a run of several ranks ends and names the rank that stands still; 0 waits
    for ever. torch.compile may need minutes for a first step."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.accumulation >= 1, "engine.accumulation", self.accumulation, "must be at least 1")
        require(self.threads >= 0, "engine.threads", self.threads, "must be at least 0")
        require(self.max_bad_steps >= 0, "engine.max_bad_steps", self.max_bad_steps, "must be at least 0")
        ok = 0 <= self.hang_timeout_s < math.inf
        require(ok, "engine.hang_timeout_s", self.hang_timeout_s, "must be at least 0 and finite")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported while a run goes on."""

    interval_steps: int = 50
    """Steps between two lines of metrics.jsonl; the only steps on which the host waits for the device."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb: bool = False
    """Show the metrics on Weights & Biases too, which must be installed; WANDB_MODE=offline keeps them here."""
    profile_steps: int = 0
    """Steps of which torch.profiler records a trace, from the third on, into profile/ of the run folder."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.interval_steps >= 1, "logging.interval_steps", self.interval_steps, "must be at least 1")
        require(self.profile_steps >= 0, "logging.profile_steps", self.profile_steps, "must be at least 0")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What survives when a run is killed."""

    interval_epochs: int = 1
    """Epochs between two checkpoints; there is always one at the end of training."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    resume: str = "auto"
    """`auto`: the newest unfinished run of this name and settings goes on; `never`: a new run; or a run folder."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.interval_epochs >= 1, "checkpoint.interval_epochs", self.interval_epochs, "must be at least 1")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "must be at least 1")
