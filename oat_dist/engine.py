"""DeepSpeed: process group, gradient reduction, precision, ZeRO, accumulation. The only file that imports deepspeed.

DeepSpeed averages gradients over ranks; the loss it is given is therefore ranks * (sum of this rank's images) / (images
of the global batch), and its own division by the accumulation steps is switched off. Then unequal numbers of images per
rank or micro-batch still weigh every image the same.
"""

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oat_dist import rendezvous
from oat_dist.bad_steps import gradient_norm
from oat_dist.config import Config
from oat_dist.determinism import choose_algorithms
from oat_dist.distributed import World
from oat_dist.models.condition import Condition
from oat_dist.models.slimming import widths_per_step
from oat_dist.optim import build_optimizer

_COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor",
                "reduce_scatter", "all_to_all_single")  # fmt: skip


def deepspeed_config(config: Config, ranks: int) -> dict:
    """DeepSpeed's own configuration, derived from ours.

    Args:
        config: Configuration of the run.
        ranks: Number of ranks.

    Returns:
        What `deepspeed.initialize` takes and the run folder keeps as deepspeed.json.
    """
    parts, cfg = ranks * config.engine.accumulation, config.engine
    overlaps = torch.cuda.is_available() if cfg.overlap_comm is None else cfg.overlap_comm
    return {
        "train_micro_batch_size_per_gpu": -(-config.optim.batch_size // parts),
        "gradient_accumulation_steps": config.engine.accumulation * widths_per_step(config.model),
        "gradient_clipping": config.optim.clip_norm,
        "zero_allow_untested_optimizer": True,
        # Without ZeRO, DeepSpeed reduces all gradients after the last backward, whatever it is told of overlapping.
        "zero_optimization": {"stage": config.engine.zero_stage, "overlap_comm": overlaps},
        "torch_autocast": {"enabled": config.engine.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        # Its stopwatch waits for the device in every forward pass of the network, those of the attack among them.
        "timers": {"throughput": {"enabled": False}},
    }


def init_world(threads: int = 0) -> World:
    """Join the process group that the launcher describes; without a launcher, be its only member.

    Args:
        threads: CPU threads of this process; 0 divides the cores by the processes on this machine.

    Returns:
        This process's place, on its GPU if the machine has any, else on the CPU.

    Raises:
        UserError: As `rendezvous.join`.
    """
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    local_ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // (1 if has_gpu else local_ranks)))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)

    rank, ranks, backend = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "nccl" if has_gpu else "gloo"
    # Before there is a group: the functions of these keep the one that they find when imported, as their default.
    deepspeed = _import_deepspeed()
    importlib.import_module("torch.distributed.nn.functional")
    # Others may have joined already: Ray, and torchrun whose agent holds the store.
    is_ours = not dist.is_initialized() and "TORCHELASTIC_RUN_ID" not in os.environ
    new_store = rendezvous.join(backend, rank=rank, ranks=ranks) if is_ours else None
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    # DeepSpeed's way out: it lets go of the groups that it made.
    leave = deepspeed.comm.destroy_process_group
    return World(rank=rank, ranks=ranks, device=device, new_store=new_store, leave=leave)


class Engine:
    """A network under DeepSpeed."""

    def __init__(self, network: nn.Module, config: Config, world: World) -> None:
        """Hand the network and a fresh optimiser to DeepSpeed.

        Args:
            network: The network on the device of `world`; all ranks get the weights of rank 0.
            config: Configuration of the run.
            world: From `init_world`.
        """
        self.config, self.world, self._network = config, world, network
        choose_algorithms(world.device, deterministic=config.engine.deterministic)
        # DeepSpeed sends the weights of rank 0 as raw bytes, which takes plain memory.
        network.to(memory_format=torch.contiguous_format)
        optimizer = build_optimizer(network, config.optim)
        if config.engine.zero_stage == 0:
            optimizer.register_step_pre_hook(self._before_update)
        self._grad_norm: Tensor | None = None
        self._engine, self._optimizer, _, _ = _import_deepspeed().initialize(
            model=network,
            optimizer=optimizer,
            config=deepspeed_config(config, world.ranks),
        )
        # ZeRO 1 and 2 made the weights slices of flat buffers, which must stay.
        if config.engine.zero_stage == 0:
            network.to(memory_format=torch.channels_last)
        # In place: a wrapper would put its own prefix before every name of the state.
        if config.engine.compile:
            network.compile()

    def forward(self, x: Tensor, cond: Condition, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The training forward of the network, under DeepSpeed's autocast."""
        return self._engine(x, cond, **kwargs)

    def forward_alone(self, x: Tensor, cond: Condition, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The training forward in the same precision, for gradients that DeepSpeed is to know nothing of."""
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.engine.precision == "bf16"):
            return self._network(x, cond, **kwargs)

    def backward_and_step(
        self,
        loss_N: Tensor,
        lr: float,
        idle: Sequence[nn.Parameter] = (),
        before_update: Callable[[], None] = lambda: None,
    ) -> Tensor | None:
        """Backward of one micro-batch at one width; the optimiser moves after the last ones of a step.

        The gradients of all widths are summed, as those of slimmable networks are (Yu et al., ICLR 2019).

        Args:
            loss_N: Per-image losses of this rank's micro-batch.
            lr: Learning rate of the step.
            idle: Parameters that the losses do not depend on. DeepSpeed reduces gradients from hooks on parameters, on
                the last backward of a step alone under ZeRO 1, so that every parameter needs one in every backward.
            before_update: Called between the last backward of a step and the optimiser.

        Returns:
            After the last of a step the norm of its gradient, equal on all ranks, before clipping with ZeRO 1 and 2 and
            after it without; else None. Where it is not finite, the optimiser has not moved with ZeRO 1 and 2, and
            without ZeRO if `engine.max_bad_steps` says so.
        """
        loss = loss_N.sum() * (self.world.ranks / self.config.optim.batch_size)
        if idle:
            loss = _WithIdle.apply(loss, *idle)
        self._engine.backward(loss, scale_wrt_gas=False)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        is_last = self._engine.is_gradient_accumulation_boundary()
        if is_last:
            before_update()
        self._engine.step()
        if is_last and self.config.engine.zero_stage:
            norm = self._engine.get_global_grad_norm()
            self._grad_norm = None if norm is None else torch.as_tensor(norm, dtype=torch.float64)
        norm, self._grad_norm = self._grad_norm, None
        return norm

    def _before_update(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Measure the gradient, reduced over ranks; torch's optimisers leave out parameters that have none."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._grad_norm = gradient_norm([p.grad for p in parameters])
        if self.config.engine.max_bad_steps and not self._grad_norm.isfinite():
            for parameter in parameters:
                parameter.grad = None

    @contextlib.contextmanager
    def metered(self, communicate: Callable[[Callable[[], Any], float], Any]) -> Iterator[None]:
        """While the block runs, pass every collective of DeepSpeed through a function.

        Args:
            communicate: Takes the collective, to be called, and how many bytes this rank sends for it in a ring: twice
                the tensor for a reduction to all, once for all others, less the share of one rank.
        """
        backend = _import_deepspeed().comm.comm.cdb
        away, names = (self.world.ranks - 1) / self.world.ranks, [n for n in _COLLECTIVES if hasattr(backend, n)]

        def through(name: str) -> Callable[..., Any]:
            collective = getattr(backend, name)

            def metered(*args: Any, **kwargs: Any) -> Any:
                tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
                size = max((t.numel() * t.element_size() for t in tensors), default=0)
                sent = size * away * (2 if name == "all_reduce" else 1)
                return communicate(lambda: collective(*args, **kwargs), sent)

            return metered

        for name in names:
            setattr(backend, name, through(name))
        try:
            yield
        finally:
            for name in names:
                delattr(backend, name)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The whole optimiser state on every rank, gathered from its shards; all ranks must call.

        Returns:
            "<parameter>/<key>" -> tensor of the parameter's shape, or a scalar (AdamW's step).
        """
        state = {}
        if self.config.engine.zero_stage and not self._optimizer.optimizer.state:
            return state
        if self.config.engine.zero_stage:
            # DeepSpeed maps parameters to their state once the first group has moved, when the others have none yet.
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._network.named_parameters():
            for key in self._state_keys:
                if self.config.engine.zero_stage:
                    state[f"{name}/{key}"] = parameter.get_full_hp_param(key)
                elif key in (own := self._optimizer.state[parameter]):
                    state[f"{name}/{key}"] = own[key]
        return state | {f"/{key}": value for key, value in self._scalar_state().items()}

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Set what `optimizer_state` gave, on any number of ranks and any ZeRO stage, before the first step."""
        if not state:  # no step was taken, or none was good
            return
        keys = self._state_keys
        scalars = {name[1:]: value for name, value in state.items() if name.startswith("/")}
        if self.config.engine.zero_stage:
            inner = self._optimizer.optimizer
            for flat in self._optimizer.single_partition_of_fp32_groups:
                inner.state[flat] = {key: torch.zeros_like(flat) for key in keys} | {
                    name: value.clone() for name, value in scalars.items()
                }
            # DeepSpeed maps parameters to slices of these on the first step; here they are needed before it.
            self._optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._network.named_parameters():
            for key in keys:
                value = state[f"{name}/{key}"].to(parameter.device)
                if self.config.engine.zero_stage:
                    parameter.set_full_hp_param(value, key)
                else:
                    laid_out = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                    self._optimizer.state[parameter] |= {key: laid_out} | {
                        name: value.clone() for name, value in scalars.items()
                    }

    @property
    def _state_keys(self) -> tuple[str, ...]:
        """Names of the optimiser state that has the shape of its parameter."""
        cfg = self.config.optim
        if cfg.optimizer == "adamw":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if cfg.momentum else ()

    def _scalar_state(self) -> dict[str, Tensor]:
        """State that all parameters share: AdamW's number of steps."""
        inner = self._optimizer.optimizer if self.config.engine.zero_stage else self._optimizer
        first = next(iter(inner.state.values()), {})  # sgd without momentum has none
        return {"step": first["step"]} if "step" in first else {}


class _WithIdle(torch.autograd.Function):
    """A loss, with gradients of zero to parameters that it does not depend on."""

    @staticmethod
    def forward(ctx, loss: Tensor, *idle: Tensor) -> Tensor:
        """The loss."""
        ctx.idle = idle
        return loss.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        """Its gradient, and zeros."""
        return grad, *map(torch.zeros_like, ctx.idle)


def _import_deepspeed():
    """Import DeepSpeed with its chatter off and without the CPU operator it would compile on first use."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The shared-memory all-reduce is for inference alone, which we do not use; building it takes a compiler. On a GPU
    # there is none, and asking which operators there are would start compilers.
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
