"""The arrangements of a training step that `train_step.py` compares, each as a function that takes one step.

    ours   `oat_dist.step.training_losses`, mean, backward, the optimiser of the engine
    a      the published arrangement (`published_step.py`), float32, NCHW, nothing compiled
    b      the same network and order of calls with autocast, channels_last and torch.compile
    c      a clean step of the plain network (film=none, norm=single) with our operator; one CUDA graph on a GPU

All draw their batches the same way: the memory loader with augmentation, lambdas by `LambdaSampler`. The phases that a
step tells its stopwatch are data, attack (with ours: condition and freeze too), train_forward, train_backward and
optimizer.
"""

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import safetensors.torch
import torch
import torch.nn.functional as F
from measuring import Stopwatch
from published_step import as_attacked, published, published_attack, published_forward, published_losses
from torch import Tensor

from oat_dist.conditioning import LambdaSampler
from oat_dist.config import Config
from oat_dist.data import Batch, PreparedData, TrainLoader
from oat_dist.data.checksum import file_sha256
from oat_dist.graphed import graph_replay
from oat_dist.losses import attack_plan
from oat_dist.models import build_model
from oat_dist.models.network import ConditionalNetwork
from oat_dist.optim import build_optimizer
from oat_dist.step import training_losses

NUM_CLASSES = 10
Step = Callable[[Stopwatch], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all arrangements of one measurement share."""

    config: Config
    """Network, batch size, attack and precision of ours and of b."""
    data: PreparedData
    """Training images."""
    device: torch.device
    """Where everything runs."""


def random_set(folder: pathlib.Path, shape_HWC: tuple[int, int, int], num_images: int) -> PreparedData:
    """A prepared data set of random training images, for the memory loader."""
    gen = torch.Generator().manual_seed(0)
    path = folder / "train.safetensors"
    tensors = {
        "image": torch.randint(256, (num_images, *shape_HWC), generator=gen, dtype=torch.uint8),
        "label": torch.randint(NUM_CLASSES, (num_images,), generator=gen),
        "index": torch.arange(num_images),
    }
    safetensors.torch.save_file(tensors, path)
    return PreparedData(
        folder=folder,
        name="random",
        classes=tuple(map(str, range(NUM_CLASSES))),
        image_shape=shape_HWC,
        counts={"train": num_images},
        pixel_mean=(0.5,) * shape_HWC[2],
        pixel_std=(0.29,) * shape_HWC[2],
        shift_pixels=4,
        flip=True,
        sha256={path.name: file_sha256(path)},
        source_sha256={},
        arguments=(),
    )


def draw_batches(setting: Setting) -> Iterator[tuple[int, Batch, Tensor]]:
    """Epoch, augmented batch on the device and lambdas on the host, without end."""
    config = setting.config
    loader = TrainLoader(setting.data, config, rank=0, ranks=1, device=setting.device)
    sampler = LambdaSampler(
        config.conditioning,
        seed=config.seed,
        batch_size=config.optim.batch_size,
        steps_per_epoch=loader.steps_per_epoch,
    )
    for epoch in itertools.count():
        for at, (batch,) in enumerate(loader.epoch(epoch)):
            yield epoch, batch, sampler.draw(epoch, at, batch.position_N, batch.index_N)


def ours(setting: Setting) -> Step:
    """A step as `oat_dist.training` takes it, on one rank and without accumulation."""
    config, network = setting.config, _network(setting, setting.config)
    optimizer = build_optimizer(network, config.optim)
    batches = draw_batches(setting)
    replay = graph_replay(config.engine.cuda_graph, setting.device, name="attack")

    def step(clock: Stopwatch) -> None:
        epoch, batch, lam_N = next(batches)
        clock.mark("data")

        def forward(x, cond):
            clock.mark("attack")
            with _autocast(setting):
                return network(x, cond)

        losses = training_losses(network, batch, lam_N, config=config, epoch=epoch, forward=forward, replay=replay)
        loss = losses.loss_N.mean()
        clock.mark("train_forward")
        _backward_and_step(loss, optimizer, clock)

    return step


def a(setting: Setting) -> Step:
    """The published arrangement."""
    return _published_step(setting, is_modern=False)


def b(setting: Setting) -> Step:
    """The published arrangement with autocast, channels_last and torch.compile."""
    return _published_step(setting, is_modern=True)


def c(setting: Setting) -> Step:
    """A clean step of the plain network; on a GPU all but the batch is one CUDA graph."""
    conditioning = dataclasses.replace(setting.config.conditioning, film="none", norm="single")
    config = dataclasses.replace(setting.config, conditioning=conditioning)
    network = _network(setting, config)
    optimizer = build_optimizer(network, config.optim)
    batches = draw_batches(setting)
    cond = network.condition(torch.zeros(config.optim.batch_size))

    def clean_loss(batch: Batch) -> Tensor:
        with _autocast(setting, cache=setting.device.type != "cuda"):
            logits = network(batch.image_NCHW, cond)
        return F.cross_entropy(logits.float(), batch.label_N)

    if setting.device.type == "cuda":
        replay = _captured(lambda batch: _backward_and_step(clean_loss(batch), optimizer), next(batches)[1])

        def step(clock: Stopwatch) -> None:
            batch = next(batches)[1]
            clock.mark("data")
            replay(batch)
            clock.mark("graph")
    else:

        def step(clock: Stopwatch) -> None:
            batch = next(batches)[1]
            clock.mark("data")
            loss = clean_loss(batch)
            clock.mark("train_forward")
            _backward_and_step(loss, optimizer, clock)

    return step


ARRANGEMENTS: dict[str, Callable[[Setting], Step]] = {"ours": ours, "a": a, "b": b, "c": c}


def _network(setting: Setting, config: Config) -> ConditionalNetwork:
    network = build_model(config, in_channels=setting.data.image_shape[2], num_classes=NUM_CLASSES)
    return network.to(setting.device, memory_format=torch.channels_last)


def _autocast(setting: Setting, *, cache: bool = True) -> contextlib.AbstractContextManager:
    """The training forward's autocast; a graph must not take casts from a cache that is emptied after its capture."""
    if setting.config.engine.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(setting.device.type, torch.bfloat16, cache_enabled=cache)


def _backward_and_step(loss: Tensor, optimizer: torch.optim.Optimizer, clock: Stopwatch | None = None) -> None:
    loss.backward()
    if clock is not None:
        clock.mark("train_backward")
    optimizer.step()
    optimizer.zero_grad()
    if clock is not None:
        clock.mark("optimizer")


def _captured(step: Callable[[Batch], None], batch: Batch) -> Callable[[Batch], None]:
    """One CUDA graph of a step on a fixed batch, behind a function that copies a batch there and replays it."""
    static = dataclasses.replace(batch, image_NCHW=batch.image_NCHW.clone(), label_N=batch.label_N.clone())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Lazily made state (momentum, workspaces, compiled kernels) must exist before the capture.
        for _ in range(3):
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(static)

    def replay(batch: Batch) -> None:
        static.image_NCHW.copy_(batch.image_NCHW)
        static.label_N.copy_(batch.label_N)
        graph.replay()

    return replay


def _published_step(setting: Setting, *, is_modern: bool) -> Step:
    config = setting.config
    network = build_model(config, in_channels=setting.data.image_shape[2], num_classes=NUM_CLASSES)
    codes_KE = network.encoder.codes_KE.to(setting.device)
    twin = published(network).to(setting.device)
    forward, autocast, memory_format = published_forward(twin), contextlib.nullcontext, torch.contiguous_format
    if is_modern:
        memory_format = torch.channels_last
        twin.to(memory_format=memory_format)
        # Three sets of shapes (clean, attack, adversarial), each compiled for itself.
        forward = torch.compile(forward, dynamic=False)
        autocast = lambda: _autocast(setting)  # noqa: E731
    optimizer = build_optimizer(twin, config.optim)
    batches, plan = draw_batches(setting), attack_plan(config)

    def step(clock: Stopwatch) -> None:
        _, batch, lam_N = next(batches)
        num_zero = int((lam_N == 0).sum())
        code_NE = codes_KE[network.encoder.rows(lam_N)[1].to(setting.device, non_blocking=True)]
        lam_N = lam_N.to(setting.device, torch.float32, non_blocking=True)
        x, label_N = batch.image_NCHW.contiguous(memory_format=memory_format), batch.label_N
        clock.mark("data")

        def attack() -> Tensor:
            clock.mark("train_forward")
            with as_attacked(twin):
                x_adv = published_attack(
                    lambda images: forward(images, code_NE[num_zero:], 0), x[num_zero:], label_N[num_zero:],
                    eps=plan.eps, steps=plan.steps, step_size=plan.step_size,
                )  # fmt: skip
            clock.mark("attack")
            return x_adv

        with autocast():
            loss = published_losses(forward, code_NE, x, label_N, lam_N, num_zero, attack).mean()
        clock.mark("train_forward")
        _backward_and_step(loss, optimizer, clock)
        # As published: the loss is read at every step.
        loss.item()

    return step
