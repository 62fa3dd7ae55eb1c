"""Muon: momentum whose steps are orthogonal matrices.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, https://kellerjordan.github.io/posts/muon/.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.SGD):
    """SGD with momentum; in groups marked "orthogonal" a step is the nearest orthogonal matrix.

    A weight of shape [out, ...] counts as a matrix [out, fan_in]. All singular values of its step are about
    sqrt(max(1, out / fan_in)), whatever the size of its gradient: the learning rate alone says how far it goes. Weight
    decay is added to the gradient, as in SGD; in orthogonal groups to the step, so that it is decoupled (Loshchilov
    and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, nesterov: bool) -> None:
        """Take parameters.

        Args:
            groups: Parameter groups of torch; "orthogonal" marks those whose steps are made orthogonal.
            lr: Learning rate of groups without their own.
            momentum: Momentum of all groups.
            nesterov: Whether it is Nesterov's.
        """
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=nesterov)
        self._momentum, self._nesterov = momentum, nesterov
        for group in self._orthogonal_groups():
            # Momentum comes before a step is made orthogonal, and SGD only adds it.
            group["momentum"], group["nesterov"] = 0, False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move; the gradients of orthogonal groups are replaced by their steps."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self._orthogonal_groups():
            for parameter in group["params"]:
                if parameter.grad is not None:
                    matrix = self._with_momentum(parameter).flatten(1)
                    scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                    parameter.grad.copy_(scale * orthogonalized(matrix).view(parameter.shape))
        super().step()
        return loss

    def _orthogonal_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group.get("orthogonal")]

    def _with_momentum(self, parameter: Tensor) -> Tensor:
        if not self._momentum:
            return parameter.grad
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(self._momentum).add_(parameter.grad)
        return parameter.grad.add(buffer, alpha=self._momentum) if self._nesterov else buffer


def orthogonalized(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T, roughly: five Newton-Schulz iterations with the coefficients of Jordan et al., 2024.

    Args:
        matrix: [m, n]; on a GPU it is computed in bf16.

    Returns:
        [m, n], the same dtype; singular values between about 0.7 and 1.2, but those near 0 stay smaller.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = (x / x.norm().clamp_min(1e-7)).to(torch.bfloat16 if matrix.is_cuda else matrix.dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).to(matrix.dtype)
