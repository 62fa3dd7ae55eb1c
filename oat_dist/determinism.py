"""Whether a GPU may choose its algorithms by speed, or must repeat a run to the last bit. A CPU always repeats."""

import contextlib
import os
from collections.abc import Iterator

import torch


def choose_algorithms(device: torch.device, *, deterministic: bool) -> None:
    """Set PyTorch's switches of this process, before the first product of matrices on the device.

    In training shapes stay the same from step to step, since the shares of lambda are exact, so cuDNN's trials are few.

    Args:
        device: Where the run is; on a CPU there is nothing to choose.
        deterministic: Ask for algorithms that always sum in one order, and be told of operators that have none; else
            cuDNN tries its algorithms on every new shape and keeps the fastest, which need not be the same next time.
    """
    if device.type != "cuda":
        return
    if deterministic:
        # cuBLAS sums in one order only with a workspace of its own per stream.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


@contextlib.contextmanager
def changing_shapes() -> Iterator[None]:
    """While the block runs, cuDNN tries nothing: with other shapes at every call it would try again each time."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
