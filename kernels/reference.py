"""The definition of the fused operator, one segment at a time, in plain PyTorch.

    y = act( film_scale * (weight * (x - mean) / sqrt(var + eps) + bias) + film_shift + residual )

Dual batch normalisation (Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020, section 3) keeps one
set of parameters and running statistics per norm group; FiLM (Perez et al., AAAI 2018, equation 1) scales and shifts
every channel. This file is what every faster form is compared with: it favours the obvious over the quick, indexes
with masks (which makes a GPU wait) and is never used in training.

Letters: N images, C channels, H, W, G norm groups, S statistic segments, L distinct lambdas.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def film_dual_bn_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    segment: Tensor,
    group_of_segment: Sequence[int],
    film_scale: Tensor | None = None,
    film_shift: Tensor | None = None,
    film_row: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    upcast: bool = True,
) -> Tensor:
    """Dual batch norm, FiLM, residual and ReLU; see `kernels.film_dual_bn` for shapes and meaning.

    Args:
        x: [N, C, H, W], any float dtype.
        weight: [G, C] affine scale per norm group.
        bias: [G, C] affine shift per norm group.
        running_mean: [G, C], updated in place when `training`.
        running_var: [G, C], updated in place when `training`, with the unbiased variance.
        segment: [N] integer in [0, S): the images whose batch statistics an image shares.
        group_of_segment: S norm groups.
        film_scale: [L, C] or None.
        film_shift: [L, C] or None.
        film_row: [N] integer in [0, L) or None.
        residual: [N, C, H, W] or None, added before the activation.
        relu: Whether the activation is ReLU or the identity.
        training: Batch statistics (True) or running statistics (False).
        momentum: Weight of the new statistics in the running ones.
        eps: Added to the variance.
        upcast: Compute half-precision input in float32; False shows what the input's own dtype would give.

    Returns:
        [N, C, H, W] in the dtype of `x`.
    """
    compute = torch.float32 if upcast and x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    xc = x.to(compute)
    out = torch.zeros_like(xc)
    for s, g in enumerate(group_of_segment):
        members = (segment == s).nonzero().flatten()
        if len(members) == 0:
            continue
        part = xc[members]
        if training:
            mean, var = part.mean((0, 2, 3)), part.var((0, 2, 3), unbiased=False)
            _move_running(running_mean[g], running_var[g], mean, var, part.numel() // part.shape[1], momentum)
        else:
            mean, var = running_mean[g].to(compute), running_var[g].to(compute)
        xhat = (part - mean[:, None, None]) / torch.sqrt(var + eps)[:, None, None]
        normed = weight[g].to(compute)[:, None, None] * xhat + bias[g].to(compute)[:, None, None]
        out = out.index_copy(0, members, normed)
    if film_scale is not None:
        out = film_scale.to(compute)[film_row.long()][:, :, None, None] * out
        out = out + film_shift.to(compute)[film_row.long()][:, :, None, None]
    if residual is not None:
        out = out + residual.to(compute)
    return (torch.relu(out) if relu else out).to(x.dtype)


@torch.no_grad()
def _move_running(
    running_mean_C: Tensor, running_var_C: Tensor, mean_C: Tensor, var_C: Tensor, count: int, momentum: float
) -> None:
    """Move one group's running statistics towards a segment's; one value alone has no unbiased variance."""
    running_mean_C.lerp_(mean_C.to(running_mean_C.dtype), momentum)
    if count > 1:
        unbiased_C = var_C * (count / (count - 1))
        running_var_C.lerp_(unbiased_C.to(running_var_C.dtype), momentum)
