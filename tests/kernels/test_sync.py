"""With `sync`, two processes compute what one computes on the joined batch."""

import pytest
import torch

from kernels import film_dual_bn
from tests.numerics import leaves, site_inputs
from tests.ranks import run_ranks

SEGMENTS = [0, 0, 1, 1, 1, 2, 2]
IMAGES = ("x", "residual", "segment", "film_row")
SHARES = {"even": [[0, 2, 4, 6], [1, 3, 5]], "a segment only on one rank": [[0, 1, 2, 3], [4, 5, 6]]}


def arguments(images: list[int]) -> dict:
    args = site_inputs(segments=SEGMENTS, height=4, width=3)
    for name in IMAGES:
        part = args[name].detach()[images].clone()
        args[name] = part.requires_grad_(args[name].requires_grad)
    return args


def compute(world, images: list[int], sync: bool) -> dict:
    args = arguments(images)
    y = film_dual_bn(**args, sync=sync)
    upstream = torch.randn(len(SEGMENTS), *y.shape[1:], generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    (y * upstream[images]).sum().backward()
    result = {"y": y.detach(), "running_mean": args["running_mean"], "running_var": args["running_var"]}
    return result | {f"grad {name}": leaf.grad for name, leaf in leaves(args).items()}


def both(world, shares: list[list[int]]) -> dict:
    return compute(world, shares[world.rank], True)


@pytest.mark.dist
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_two_processes_equal_one_with_the_joined_batch(shares):
    joined = compute(None, list(range(len(SEGMENTS))), False)
    parts = run_ranks(both, 2, shares)
    for name, expected in joined.items():
        if name in ("y", "grad x", "grad residual"):
            got = torch.empty_like(expected)
            for images, part in zip(shares, parts, strict=True):
                got[images] = part[name]
        elif name.startswith("grad"):
            got = parts[0][name] + parts[1][name]
        else:
            got = parts[0][name]
            assert torch.equal(got, parts[1][name]), f"{name} differs between ranks"
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=name)
