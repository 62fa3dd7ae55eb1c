"""Augmentation of a whole batch by tensor operations, with draws keyed by image (see `oat_dist.random`).

Letters: N images, C channels, H, W.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from oat_dist.random import draw_keys, integers


def augment(x_NCHW: Tensor, index_N: Tensor, *, seed: int, epoch: int, shift_pixels: int, flip: bool) -> Tensor:
    """Translate and flip each image by its own draw.

    Args:
        x_NCHW: Images, any dtype.
        index_N: [N] dataset indices, on the device of the images.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        shift_pixels: Translation by up to this many pixels each way; equal to padding by it and a random crop.
        flip: Mirror half of the images left to right.

    Returns:
        New images; the given ones when there is nothing to do.
    """
    if shift_pixels == 0 and not flip:
        return x_NCHW
    height, width = x_NCHW.shape[2:]
    device = x_NCHW.device
    key_N = draw_keys(seed, "augmentation", epoch, index_N)
    offset_N2 = integers(key_N, 2, 2 * shift_pixels + 1)
    flip_N = integers(draw_keys(seed, "flip", epoch, index_N), 1, 2)[:, 0].bool() & flip
    column_NW = torch.arange(width, device=device).expand(len(x_NCHW), width)
    column_NW = torch.where(flip_N[:, None], width - 1 - column_NW, column_NW) + offset_N2[:, 1:]
    row_NH = torch.arange(height, device=device) + offset_N2[:, :1]
    # Channels last while gathering: one index per pixel moves all its channels.
    padded_NHWC = F.pad(x_NCHW, (shift_pixels,) * 4).permute(0, 2, 3, 1)
    image_N11 = torch.arange(len(x_NCHW), device=device)[:, None, None]
    return padded_NHWC[image_N11, row_NH[:, :, None], column_NW[:, None, :]].permute(0, 3, 1, 2)


def cutout(x_NCHW: Tensor, index_N: Tensor, *, seed: int, epoch: int, pixels: int, fill_C: Tensor) -> Tensor:
    """Blank out a square of every image, cut where it hangs over the edge.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (2017), section 3.2: the
    centre is drawn evenly from all pixels.

    Args:
        x_NCHW: Images, any dtype.
        index_N: [N] dataset indices, on the device of the images.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        pixels: Side of the square; 0 blanks nothing.
        fill_C: [C] value of blanked pixels, the mean of the data set, in the dtype of the images.

    Returns:
        New images; the given ones when there is nothing to do.
    """
    if pixels == 0:
        return x_NCHW
    height, width = x_NCHW.shape[2:]
    key_N = draw_keys(seed, "cutout", epoch, index_N)
    first_N2 = torch.cat(
        [integers(draw_keys(0, axis, key_N), 1, size) for axis, size in (("row", height), ("column", width))], 1
    )
    first_N2 = first_N2 - pixels // 2
    row, column = (torch.arange(size, device=x_NCHW.device) for size in (height, width))
    in_row_NH, in_column_NW = (
        (at >= first_N2[:, axis, None]) & (at < first_N2[:, axis, None] + pixels)
        for axis, at in enumerate((row, column))
    )
    inside_N1HW = (in_row_NH[:, :, None] & in_column_NW[:, None, :])[:, None]
    return torch.where(inside_N1HW, fill_C.view(1, -1, 1, 1), x_NCHW)
