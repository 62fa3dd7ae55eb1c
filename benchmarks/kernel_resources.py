"""What do the Triton kernels ask of a GPU? Compiles them for several architectures; needs no GPU.

    python benchmarks/kernel_resources.py [--few]

Runs every launcher on tensors without memory at the sites of ResNet-34 (batch 512, 32x32), WRN-16-8 (32x32) and
WRN-40-2 (96x96), records what it would launch, compiles that for sm_80, sm_90 and sm_100, and reads registers, spills,
stack and shared memory from the machine code and the width of global loads and stores from the PTX. Prints one row per
kernel, tile, dtype and target, and writes the worst of each kernel and target between the markers in docs/numerics.md.
`--few` compiles a sample (ResNet-34 at its first and last stage for sm_90, for the test), prints its rows as JSON and
writes nothing.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator

# Compiling is the point here: the interpreter, if set for tests, would leave nothing to compile.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels import triton_backend

TARGETS = (80, 90, 100)
# name: (images, channels, side of the image)
SITES = {
    "ResNet-34": [(512, 64, 32), (512, 128, 16), (512, 256, 8), (512, 512, 4)],
    "WRN-16-8": [(512, 16, 32), (512, 128, 32), (512, 256, 16), (512, 512, 8)],
    "WRN-40-2": [(128, 16, 96), (128, 32, 96), (128, 64, 48), (128, 128, 24)],
}
GROUPS = (0, 1, 1)
LAMBDAS = 6
DOCS = pathlib.Path(__file__).parent.parent / "docs" / "numerics.md"
MARKERS = ("<!-- kernel resources: begin -->", "<!-- kernel resources: end -->")
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
          torch.int32: "i32", torch.int64: "i64"}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """What a launcher asked for: a kernel specialised as Triton would specialise it."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, object], ...]

    @classmethod
    def of(cls, kernel: JITFunction, args: tuple, kwargs: dict) -> "Launch":
        """Bind arguments as a launch does: None, 1 and constexpr are constants, multiples of 16 are known as such."""
        options = {key: kwargs[key] for key in kwargs if key not in kernel.arg_names and key not in ("grid", "warmup")}
        values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in options}
        signature, constants, aligned = {}, {}, []
        for position, param in enumerate(kernel.params):
            value = values[param.name]
            free = not param.do_not_specialize
            if param.is_constexpr or value is None or (free and isinstance(value, int) and value == 1):
                signature[param.name], constants[param.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[param.name] = f"*{_TYPES[value.dtype]}"
                aligned.append(position)  # the allocator aligns to far more than 16 bytes
            else:
                signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if free and value % 16 == 0:
                    aligned.append(position)
        return cls(
            kernel=kernel, signature=tuple(signature.items()), constants=tuple(constants.items()),
            aligned=tuple(aligned), options=tuple(sorted(options.items())),
        )  # fmt: skip

    def compile(self, target: int):
        """The compiled kernel for sm_<target>."""
        attributes = {(position,): [["tt.divisibility", 16]] for position in self.aligned}
        source = ASTSource(self.kernel, dict(self.signature), dict(self.constants), attributes)
        return triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(self.options))


def recorded(call) -> list[Launch]:
    """The launches of `call`, none of which runs."""
    launches, original = [], JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: launches.append(Launch.of(self, args, kwargs))
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def site_calls(num: int, channels: int, side: int, dtype: torch.dtype) -> Iterator:
    """Every launcher with the options of a conditioned network: FiLM, ReLU, with and without residual."""

    def images() -> Tensor:
        return torch.empty((num, channels, side, side), dtype=dtype, device="meta").contiguous(
            memory_format=torch.channels_last
        )

    def table(rows: int) -> Tensor:
        return torch.empty((rows, channels), device="meta")

    groups, segments = max(GROUPS) + 1, len(GROUPS)
    index = torch.empty(num, dtype=torch.int64, device="meta")
    shared = {"segment_N": index, "groups": GROUPS, "film_scale_LC": table(LAMBDAS), "film_row_N": index}
    shared |= {"relu": True, "eps": 1e-5}
    x, weight, mean, scale = images(), table(groups), table(segments), table(LAMBDAS)
    yield lambda: triton_backend.segment_statistics(x, index, segments)
    yield lambda: triton_backend.update_running(
        weight, weight, torch.empty(segments, device="meta"), mean, mean, GROUPS, 0.1
    )
    yield lambda: triton_backend.reduce_grads(x, x, x, weight, weight, mean, mean, **shared)
    yield lambda: triton_backend.modulate_grads(x, x, None, scale, index, relu=True, want_affine=False,
                                                want_residual=False)  # fmt: skip
    yield lambda: triton_backend.modulate_grads(x, x, x, scale, index, relu=True, want_affine=True,
                                                want_residual=True)  # fmt: skip
    for residual in (None, x):
        yield lambda r=residual: triton_backend.apply(x, weight, weight, mean, mean, film_shift_LC=scale, residual=r,
                                                      **shared)  # fmt: skip
        yield lambda r=residual: triton_backend.modulate(x, scale, scale, index, residual=r, relu=True)
        yield lambda r=residual: triton_backend.input_grad(x, x, x, weight, mean, mean, mean, mean,
                                                           want_residual=r is not None, **shared)  # fmt: skip


def measure(launch: Launch, target: int) -> dict[str, object]:
    """Compile and read registers, stack (where spills go) and local and shared memory, and widths of access."""
    compiled = launch.compile(target)
    nvidia = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [nvidia / "cuobjdump", "-res-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    tile = {key: value for key, value in launch.constants if key in ("FOLD", "LANES", "ROWS", "BLOCK_C")}
    ptx = compiled.asm["ptx"]
    return {
        "kernel": launch.kernel.__name__,
        "tile": "x".join(str(value) for value in tile.values()),
        "dtype": next(kind.removeprefix("*") for _, kind in launch.signature if kind.startswith("*")),
        "target": f"sm_{target}",
        "registers": used["REG"],
        "stack_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": int(compiled.metadata.shared),
        "load_bytes": max(accesses(ptx, "ld")),
        "store_bytes": max(accesses(ptx, "st")),
        "narrow_half": sum(width == 2 for kind in ("ld", "st") for width in accesses(ptx, kind)),
    }


def accesses(ptx: str, kind: str) -> list[int]:
    """Bytes of every global load ("ld", copies to shared memory too) or store ("st")."""
    pattern = rf"\b{kind}\.global(?:\.[a-zA-Z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)\s"
    widths = [int(count or 1) * int(bits) // 8 for count, bits in re.findall(pattern, ptx)]
    if kind == "ld":
        copies = re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)", ptx)
        widths += [int(size, 0) for size in copies]
    return widths


def launches(sites: list[tuple[int, int, int]], dtypes: tuple[torch.dtype, ...]) -> list[Launch]:
    """What the sites launch, each specialisation once."""
    every = [
        launch for site in sites for dtype in dtypes for call in site_calls(*site, dtype) for launch in recorded(call)
    ]
    return list(dict.fromkeys(every))


def worst(rows: list[dict]) -> list[str]:
    """Markdown table: the worst over sites and dtypes of every kernel and target."""
    lines = [
        "| kernel | target | variants | registers | stack, bytes | shared memory, bytes | widest load / store, bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for kernel, target in dict.fromkeys((row["kernel"], row["target"]) for row in rows):
        mine = [row for row in rows if (row["kernel"], row["target"]) == (kernel, target)]
        most = {key: max(row[key] for row in mine) for key in ("registers", "stack_bytes", "shared_bytes")}
        load, store = (min(row[key] for row in mine) for key in ("load_bytes", "store_bytes"))
        lines.append(f"| `{kernel}` | {target} | {len(mine)} | " + " | ".join(map(str, most.values()))
                     + f" | {load} / {store} |")  # fmt: skip
    return lines


def write_docs(rows: list[dict]) -> None:
    """Put the table between the markers."""
    text = DOCS.read_text()
    begin, end = (text.index(marker) for marker in MARKERS)
    note = f"triton {triton.__version__}, batch 512 (128 for 96x96 inputs), bfloat16 and float32:"
    DOCS.write_text(text[:begin] + "\n\n".join([MARKERS[0], note, "\n".join(worst(rows)), text[end:]]))


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", action="store_true", help="a sample, as JSON; docs/numerics.md stays as it is")
    args = parser.parse_args()
    if args.few:
        first, *_, last = SITES["ResNet-34"]
        print(json.dumps([measure(launch, 90) for launch in launches([first, last], (torch.bfloat16,))]))
        return
    sites = [site for network in SITES.values() for site in network]
    rows = []
    for launch in launches(sites, (torch.bfloat16, torch.float32)):
        for target in TARGETS:
            rows.append(measure(launch, target))
            print(*rows[-1].values() if len(rows) > 1 else [*rows[-1], "\n", *rows[-1].values()], flush=True)
    write_docs(rows)


if __name__ == "__main__":
    main()
