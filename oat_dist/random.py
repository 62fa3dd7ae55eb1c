"""Random numbers that are looked up, not drawn in sequence.

A draw is a pure function of a key - (seed, purpose, epoch, image, ...) - and a position. So an image gets the same
lambda, augmentation and random start whatever the number of ranks or workers and whether or not the run was resumed,
and the same bits on CPU and GPU. The generator is SplitMix64 in counter mode (Steele, Lea and Flood, "Fast Splittable
Pseudorandom Number Generators", OOPSLA 2014, figure 14); int64 tensors stand for its uint64 words.

Letters: N images, D draws per image.
"""

import zlib

import torch
from torch import Tensor


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MUL1 = _signed(0xBF58476D1CE4E5B9)
_MUL2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of the 64-bit words (torch shifts int64 arithmetically)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MUL1
    x = (x ^ _shift_right(x, 27)) * _MUL2
    return x ^ _shift_right(x, 31)


def draw_keys(seed: int, purpose: str, *words: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """One key per image for one purpose.

    Args:
        seed: Seed of the run.
        purpose: Name of what is drawn; different names give independent draws.
        *words: Further parts of the key, e.g. the epoch and the [N] int64 dataset indices.
        device: Where the keys are computed; default: where the first tensor among `words` is.

    Returns:
        [N] int64 keys, or [1] when no word is a tensor.
    """
    if device is None:
        device = next((w.device for w in words if isinstance(w, Tensor)), torch.device("cpu"))
    key = torch.full((1,), seed * 0x100000000 + zlib.crc32(purpose.encode()), dtype=torch.int64, device=device)
    key = _mix(key + _GAMMA)
    for word in words:
        key = _mix((key ^ word) + _GAMMA)
    return key


def random_bits(key_N: Tensor, num_draws: int) -> Tensor:
    """[N, D] int64 words whose 64 bits are uniform; column d is the same whatever `num_draws`."""
    counter_D = torch.arange(1, num_draws + 1, dtype=torch.int64, device=key_N.device)
    return _mix(key_N[:, None] + counter_D * _GAMMA)


def uniform(key_N: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """[N, *shape] float32 in [0, 1), multiples of 2^-24: exact on every device."""
    num_draws = 1
    for size in shape:
        num_draws *= size
    words_ND = _shift_right(random_bits(key_N, num_draws), 40)
    return (words_ND.to(torch.float32) * 2.0**-24).view(len(key_N), *shape)


def integers(key_N: Tensor, num_draws: int, limit: int) -> Tensor:
    """[N, D] int64 uniform in [0, limit), limit <= 65536 (bias below 2^-31)."""
    assert 0 < limit <= 1 << 16, "47 random bits times the limit must fit 63 bits"
    return (_shift_right(random_bits(key_N, num_draws), 17) * limit) >> 47


def normal(key_N: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[N, *shape] float32 standard normal by Box and Muller's transform; last bits may differ between devices."""
    u_2 = uniform(key_N, (2, *shape))
    radius = torch.sqrt(-2 * torch.log1p(-u_2[:, 0]))
    return radius * torch.cos(2 * torch.pi * u_2[:, 1])


def permutation(num: int, seed: int, purpose: str, *words: int) -> Tensor:
    """[num] int64: a random order of 0 .. num-1."""
    index = torch.arange(num, dtype=torch.int64)
    return random_bits(draw_keys(seed, purpose, *words, index), 1)[:, 0].argsort(stable=True)
