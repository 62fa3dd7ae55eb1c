"""`engine.compile`: what torch.compile needs from the machine, checked before anything starts."""

import os
import shutil

import torch

from oat_dist.errors import UserError


def require_compiler(device: torch.device) -> None:
    """Refuse `engine.compile` on a machine without the compiler that it calls.

    Args:
        device: Where the network computes: torch.compile makes C++ for a CPU, and for a GPU Triton makes a C launcher.

    Raises:
        UserError: There is none.
    """
    variable, language, defaults = ("CC", "C", ("gcc", "clang"))
    if device.type == "cpu":
        variable, language, defaults = ("CXX", "C++", ("g++",))
    named = os.environ.get(variable)
    if not any(shutil.which(name) for name in ((named,) if named else defaults)):
        wanted = f"{variable}={named}" if named else " or ".join(defaults)
        raise UserError(
            f"engine.compile=True: needs a {language} compiler ({wanted} not found); install one, name it in "
            f"{variable}, or set engine.compile=false"
        )
