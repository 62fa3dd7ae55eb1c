"""Steps whose loss or gradient is not finite: what they were made of, and going on without them.

Order, lambda, augmentation and random start of an image follow from seed, epoch and index, so the indices of a step are
enough to make it again.
"""

import json
import pathlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from oat_dist.checkpoint import Checkpoint
from oat_dist.distributed import World
from oat_dist.divergence import LossWatch
from oat_dist.errors import NonFiniteError
from oat_dist.weights import whole_file

_FOLDER = "bad_steps"


class RecentSteps:
    """Images, lambdas and losses of this rank since somebody last looked whether all was finite."""

    def __init__(self, run: pathlib.Path, rank: int) -> None:
        """Remember nothing yet.

        Args:
            run: Folder of the run.
            rank: This rank.
        """
        self._run, self._rank = run, rank
        self._steps: dict[int, list[tuple[int, Tensor, Tensor, Tensor]]] = {}

    def add(self, step: int, epoch: int, index_N: Tensor, lam_N: Tensor, loss_N: Tensor) -> None:
        """Remember a micro-batch; nothing waits for the device.

        Args:
            step: Number of the optimiser step, from 1.
            epoch: Its epoch, from 0.
            index_N: Dataset indices, on the host.
            lam_N: Lambdas, on the host.
            loss_N: Per-image losses.
        """
        self._steps.setdefault(step, []).append((epoch, index_N, lam_N, loss_N.detach()))

    def forget(self) -> None:
        """All steps so far were finite."""
        self._steps.clear()

    def write(self, step: int) -> None:
        """Keep the evidence: <run>/bad_steps/step_<step>_rank<rank>.json; the host waits for the device.

        Args:
            step: The step.
        """
        images, epochs = [], set()
        for epoch, index_N, lam_N, loss_N in self._steps.get(step, []):
            epochs.add(epoch)
            for index, lam, loss in zip(index_N.tolist(), lam_N.tolist(), loss_N.tolist(), strict=True):
                # JSON has no word for what is not finite.
                images.append(
                    {"index": index, "lam": lam, "loss": loss if torch.tensor(loss).isfinite() else str(loss)}
                )
        folder = self._run / _FOLDER
        folder.mkdir(exist_ok=True)
        with whole_file(folder / f"step_{step:08d}_rank{self._rank}.json") as temporary:
            temporary.write_text(json.dumps({"step": step, "epoch": epochs.pop(), "images": images}, indent=1) + "\n")


class StepHealth:
    """Whether steps are finite; leaves out up to `engine.max_bad_steps` bad ones, as if they had not been taken."""

    def __init__(self, world: World, run: pathlib.Path, network: nn.Module, *, max_bad_steps: int) -> None:
        """No bad step yet.

        Args:
            world: The ranks.
            run: Folder of the run.
            network: Its running statistics move in the forward pass, before it is known whether the step is good.
            max_bad_steps: How many may be left out; 0 asks nothing, and never waits for the device.
        """
        self.max_bad_steps, self.skipped = max_bad_steps, 0
        self._world, self._watch, self._recent = world, LossWatch(world), RecentSteps(run, world.rank)
        self._statistics = [b for name, b in network.named_buffers() if "running_" in name] if max_bad_steps else []
        self._before: list[Tensor] = []
        self._losses: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        """Before a step."""
        self._before = [buffer.clone() for buffer in self._statistics]
        self._losses.clear()

    def add(self, step: int, epoch: int, index_N: Tensor, lam_N: Tensor, loss_N: Tensor) -> None:
        """Take note of a micro-batch; as `RecentSteps.add`."""
        self._losses.append((loss_N, lam_N))
        self._recent.add(step, epoch, index_N, lam_N, loss_N)

    def is_good(self, step: int, grad_norm: Tensor) -> bool:
        """Whether a step counts; one that does not has been undone, by the optimiser (see `Engine`) and here.

        Args:
            step: Number of the step, from 1.
            grad_norm: Norm of its gradient, equal on all ranks; the host waits for it if steps may be left out.

        Raises:
            NonFiniteError: It is one bad step too many; on every rank.
        """
        if not self.max_bad_steps or bool(grad_norm.isfinite()):
            for loss_N, lam_N in self._losses:
                self._watch.add(step, loss_N, lam_N)
            self._watch.add_gradient(step, grad_norm)
            return True
        self._recent.write(step)
        self.skipped += 1
        if self.skipped > self.max_bad_steps:
            raise NonFiniteError(
                f"engine.max_bad_steps={self.max_bad_steps}: the gradient of step {step} is not finite, one too many; "
                "lower optim.lr, or set optim.clip_norm"
            )
        for buffer, before in zip(self._statistics, self._before, strict=True):
            buffer.copy_(before)
        if self._world.is_main:
            print(f"step {step}: the gradient is not finite; left out ({self.skipped} so far)")
        return False

    def check(self, last_good: Callable[[], Checkpoint | None]) -> None:
        """Stop, with the evidence kept, if a loss or gradient was not finite; as `LossWatch.check`."""
        try:
            self._watch.check(last_good)
        except NonFiniteError as error:
            self._recent.write(error.step)
            raise
        self._recent.forget()


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, float64, on their device; not finite where one of them is not."""
    norms = torch._foreach_norm(list(gradients))
    return torch.stack(norms).double().square().sum().sqrt()
