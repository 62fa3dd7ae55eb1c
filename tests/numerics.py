"""How exact an operator has to be, and random inputs for it."""

import torch
from torch import Tensor

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def assert_as_good_as_plain(ours: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    """Our error against the exact value is at most twice that of plain PyTorch in the same dtype, plus rounding.

    The rounding term is one unit in the last place of the dtype at the size of the largest exact value.
    """
    error = (ours.double() - exact.double()).abs().max().item()
    allowed = 2 * (plain.double() - exact.double()).abs().max().item()
    allowed += EPS[ours.dtype] * exact.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def site_inputs(
    seed: int = 0,
    *,
    segments: list[int],
    channels: int = 5,
    height: int = 3,
    width: int = 4,
    groups: int = 2,
    rows: int = 3,
    dtype: torch.dtype = torch.float64,
    film: bool = True,
    residual: bool = True,
    mean: float = 0.0,
) -> dict:
    """Arguments of `film_dual_bn`, with gradients wanted from every float input but the statistics."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int, at: float = 0.0) -> Tensor:
        value = (torch.randn(*shape, generator=gen, dtype=torch.float64) + at).to(dtype)
        if len(shape) == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        return value.requires_grad_(True)

    num = len(segments)
    args = {
        "x": normal(num, channels, height, width, at=mean),
        "weight": normal(groups, channels, at=1.0),
        "bias": normal(groups, channels),
        "running_mean": torch.randn(groups, channels, generator=gen, dtype=torch.float64).to(dtype),
        "running_var": torch.rand(groups, channels, generator=gen, dtype=torch.float64).to(dtype) + 0.5,
        "segment": torch.tensor(segments, dtype=torch.int32),
        "group_of_segment": (0, 1, 1) if groups == 2 else (0, 0, 0),
    }
    if film:
        args["film_scale"], args["film_shift"] = normal(rows, channels, at=1.0), normal(rows, channels)
        args["film_row"] = torch.randint(rows, (num,), generator=gen)
    if residual:
        args["residual"] = normal(num, channels, height, width)
    return args


def leaves(args: dict) -> dict[str, Tensor]:
    """The inputs that want a gradient."""
    return {name: t for name, t in args.items() if isinstance(t, Tensor) and t.requires_grad}


def copy_of(args: dict, dtype: torch.dtype | None = None) -> dict:
    """Independent copies, in another float dtype if given."""

    def copy(t: Tensor) -> Tensor:
        new = t.detach().clone()
        if new.is_floating_point() and dtype is not None:
            new = new.to(dtype)
        return new.requires_grad_(t.requires_grad)

    return {name: copy(t) if isinstance(t, Tensor) else t for name, t in args.items()}
