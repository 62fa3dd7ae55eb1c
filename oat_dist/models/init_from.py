"""Starting from the weights of another run: `model.init_from`.

Conditional weights must fit the network name by name. Plain weights (film=none, norm=single: an ordinary classifier)
fit every network of the same layers: each norm's one group is copied to all groups, FiLM and encoding stay at their
start, and so do the norms of other widths. With `film_start=identity` the network then answers as the plain one at
every lambda.

Files are read by safetensors alone; nothing is unpickled. Everything is checked before the first weight changes.

Letters: G norm groups, C channels, K lambdas that own a code.
"""

import os
import pathlib

import torch
from torch import Tensor

from oat_dist.errors import UserError
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.norm import FiLMDualBN2d
from oat_dist.weights import read_tensors

_NAMED = 5


@torch.no_grad()
def initialise_from(network: ConditionalNetwork, path: str | os.PathLike[str]) -> None:
    """Copy the weights and statistics of a file into a network.

    Args:
        network: Network to start; its dtype and device stay.
        path: A .safetensors file, e.g. model.safetensors of a run.

    Raises:
        UserError: The file is missing or no safetensors file, or does not fit; the misfits are listed by name.
    """
    tensors = _read(path)
    state = network.state_dict()
    grouped, conditional = _roles(network)
    is_plain = not conditional & tensors.keys() and all(tensors[n].shape[:1] == (1,) for n in grouped & tensors.keys())
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if is_plain:
        expected = {
            name: (1, *shape[1:]) if name in grouped else shape
            for name, shape in expected.items()
            if name not in conditional
        }
    misfits = [f"{name} missing" for name in expected if name not in tensors]
    misfits += [f"{name} unknown" for name in tensors if name not in expected]
    misfits += [
        f"{name} is {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if not misfits and "encoder.knots_K" in expected:
        theirs, ours = tensors["encoder.knots_K"].double(), state["encoder.knots_K"].double().cpu()
        # A code belongs to its lambda; the tolerance lets tables pass that were stored in float32.
        if not torch.allclose(theirs, ours, rtol=0, atol=1e-6):
            misfits = [f"encoder.knots_K is {_lambdas(theirs)}, not {_lambdas(ours)}"]
    if misfits:
        more = f" and {len(misfits) - _NAMED} more" if len(misfits) > _NAMED else ""
        raise UserError(f"model.init_from={str(path)!r}: does not fit: {'; '.join(misfits[:_NAMED])}{more}")
    for name in expected:
        state[name].copy_(tensors[name])  # one group broadcasts to all


def _read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    try:
        return read_tensors(pathlib.Path(path))[0]
    except UserError as error:
        raise UserError(f"model.init_from: {error}; name a .safetensors file") from None


def _lambdas(knots_K: Tensor) -> str:
    return "[" + ", ".join(f"{lam:g}" for lam in knots_K.tolist()) + "]"


def _roles(network: ConditionalNetwork) -> tuple[set[str], set[str]]:
    """Names of [G, C] tensors, and of all that a plain network lacks (FiLM, encoding, noise, other widths)."""
    grouped, conditional = set(), set()
    for path, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, FiLMDualBN2d):
            grouped |= {f"{path}.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
            if module.film is not None:
                conditional |= {f"{path}.film.{name}" for name in module.film.state_dict()}
    own = (".narrow.", "film_trunk.", ".alpha")
    conditional |= {name for name in network.state_dict() if any(part in name for part in own)}
    if network.encoder is not None:
        conditional |= {f"encoder.{name}" for name in network.encoder.state_dict()}
    return grouped, conditional
