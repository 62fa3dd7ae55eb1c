"""How tensors are cut into tiles for the Triton kernels, and the pieces of device code that all kernels share.

An image tensor in channels_last lies in memory as [N, P, C]. A program works on tiles of `rows` consecutive pixels of
one image by `channels` consecutive channels, so everything that depends on the image or on the channel (statistics,
affine, FiLM row) is one vector per tile. All numbers here are fixed tables of the shape and the element size: nothing
is timed at run time and nothing depends on the device, so that equal input gives equal bits.

Letters: N images, P = H*W pixels, C channels, S statistic segments, G norm groups, U = N * splits units of work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_VECTOR_BYTES = 16  # widest load of one thread
_NUM_WARPS = 4
_THREADS = 32 * _NUM_WARPS
# Statistics: two programs on each of the 132 processors of an H100, all running at once, each with several tiles under
# way. Each leaves a partial row per segment that the merge reads again, so more programs would make the merge longer.
_STATISTICS_PROGRAMS = 256
_STATISTICS_STAGES = 5
_STATISTICS_REGISTERS = 255  # two programs of 128 threads fit a processor of 65536
# Gradient sums: images are independent, so several programs per processor queue up and even out.
_GRADIENT_PROGRAMS = 1024
_GROUP_BITS = 3

MAX_SEGMENTS = 8
MAX_GROUPS = 2**_GROUP_BITS


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tile shape and share of the work of a program."""

    rows: int
    """Pixels of one image per tile; a power of two."""
    channels: int
    """Channels per tile; a power of two."""
    fold: int = 1
    """Rows that a thread adds up by itself before anything is exchanged between threads; divides `rows`."""
    parts: int = 1
    """Reductions: programs per block of channels (statistics) or per image and block of channels (gradients)."""
    stages: int = 1
    """Tiles under way at a time: later ones are copied to shared memory while one is worked on."""
    num_warps: int = _NUM_WARPS
    """Warps of 32 threads per program."""
    max_registers: int | None = None
    """Registers per thread at most. Left to itself the assembler saves registers in some kernels by spilling."""

    def options(self) -> dict[str, int | None]:
        """Launch options."""
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers}

    def tiles_per_image(self, pixels: int) -> int:
        """Tiles one above the other in an image of P pixels."""
        return triton.cdiv(pixels, self.rows)

    def channel_blocks(self, channels: int) -> int:
        """Tiles side by side over C channels."""
        return triton.cdiv(channels, self.channels)


def elementwise_plan(pixels: int, channels: int, element_size: int, *, max_registers: int = 96) -> Plan:
    """Four 16-byte loads per thread and tensor, with five programs per processor at 96 registers (four at 128).

    Args:
        pixels: P.
        channels: C.
        element_size: Bytes per value.
        max_registers: 96 holds two tensors, 128 four.

    Returns:
        Plan of a kernel without reduction.
    """
    rows, width = _tile(pixels, channels, 4 * _elements_per_pass(element_size))
    return Plan(rows=rows, channels=width, max_registers=max_registers)


def statistics_plan(num: int, pixels: int, channels: int, element_size: int) -> Plan:
    """Four 16-byte loads per thread and tile, five tiles under way; `parts` runs of tiles per block of channels."""
    one_pass = _elements_per_pass(element_size)
    rows, width = _tile(pixels, channels, 4 * one_pass)
    blocks, tiles = triton.cdiv(channels, width), num * triton.cdiv(pixels, rows)
    parts = max(1, min(tiles, _STATISTICS_PROGRAMS // blocks))
    return Plan(
        rows=rows, channels=width, fold=_fold(rows, width, one_pass), parts=parts, stages=_STATISTICS_STAGES,
        max_registers=_STATISTICS_REGISTERS,
    )  # fmt: skip


def gradients_plan(num: int, pixels: int, channels: int, element_size: int) -> Plan:
    """Four 16-byte loads per thread of each of three tensors; images are split until there are programs enough."""
    one_pass = _elements_per_pass(element_size)
    rows, width = _tile(pixels, channels, 4 * one_pass)
    blocks, tiles = triton.cdiv(channels, width), triton.cdiv(pixels, rows)
    splits = min(tiles, triton.cdiv(_GRADIENT_PROGRAMS, max(1, num * blocks)))
    # No empty split: seven tiles in four splits are two, two, two and one.
    parts = triton.cdiv(tiles, triton.cdiv(tiles, splits))
    return Plan(rows=rows, channels=width, fold=_fold(rows, width, one_pass), parts=parts)


def _elements_per_pass(element_size: int) -> int:
    """Elements that all threads of a program load with one vector each."""
    return _THREADS * _VECTOR_BYTES // element_size


def _tile(pixels: int, channels: int, elements: int) -> tuple[int, int]:
    """Rows and channels of a tile of `elements` elements, fewer if the image is smaller.

    Channels first, because neighbours in memory are channels, up to 128: more would read more parameters per element.
    A width that divides C wastes no threads. Where an image has few pixels the tile grows sideways instead.
    """
    divisor = channels & -channels
    width = min(128, divisor if divisor >= 32 else triton.next_power_of_2(channels))
    rows = min(triton.next_power_of_2(pixels), max(1, elements // width))
    while 2 * width * rows <= elements and width < channels:
        width *= 2
    return rows, width


def _fold(rows: int, width: int, one_pass: int) -> int:
    """Rows per thread when the threads of a program lie over channels first, then over rows."""
    return rows // min(rows, max(1, one_pass // width))


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The Triton dtype of statistics and sums: float64 for float64 input, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def torch_accumulator(dtype: torch.dtype) -> torch.dtype:
    """The same for tensors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack_groups(groups: Sequence[int]) -> int:
    """The norm group of every segment as one integer, which needs no copy to the device.

    Args:
        groups: At most 8 numbers in [0, 8).

    Returns:
        Three bits per segment, the first segment lowest.
    """
    assert len(groups) <= MAX_SEGMENTS and all(0 <= g < MAX_GROUPS for g in groups), groups
    return sum(g << (_GROUP_BITS * s) for s, g in enumerate(groups))


def shape_of(x: Tensor) -> tuple[int, int, int]:
    """N, P, C of [N, C, H, W] images, which must be contiguous in channels_last."""
    assert x.numel() == 0 or x.is_contiguous(memory_format=torch.channels_last), x.stride()
    num, channels, height, width = x.shape
    return num, height * width, channels


def dense(*small: Tensor | None) -> list[Tensor | None]:
    """Row-major copies of parameters and indices where they are not row-major already."""
    return [t if t is None else t.contiguous() for t in small]


@triton.jit
def group_of(groups, segment):
    """Norm group of a segment; see `pack_groups`."""
    return (groups >> (3 * segment)) & 7


@triton.jit
def image_tile(P, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Tile of an elementwise kernel: its image, channels, 64-bit start, 32-bit offsets from there, and their mask."""
    blocks = tl.cdiv(C, BLOCK_C)
    tiles = tl.cdiv(P, ROWS)
    pid = tl.program_id(0)
    t = pid // blocks
    n = t // tiles
    first = t % tiles * ROWS
    c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, ROWS)
    start = (n.to(tl.int64) * P + first) * C
    return n, c, start, p[:, None] * C + c[None, :], (first + p < P)[:, None] & (c < C)[None, :]


@triton.jit
def load_row(ptr, row, C, c, ACC: tl.constexpr):
    """Channels `c` of row `row` of a small [rows, C] tensor."""
    return tl.load(ptr + row * C + c, mask=c < C, other=0.0).to(ACC)


@triton.jit
def below_relu(dy, y_ptr, at, mask):
    """Gradient below the ReLU: dy where y is positive or NaN, else 0; without ReLU (no y) dy itself."""
    if y_ptr is not None:
        # Cast before the comparison: the interpreter would compare the bits of bfloat16.
        dy = tl.where(tl.load(y_ptr + at, mask=mask, other=0.0).to(dy.dtype) <= 0, 0.0, dy)
    return dy


@triton.jit
def reciprocal_std(var, EPS: tl.constexpr):
    """1 / sqrt(var + eps)."""
    return 1.0 / tl.sqrt(var + EPS)
