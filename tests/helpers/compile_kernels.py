"""Compile the kernels for an absent GPU: `compile_kernels.py 90 64 256` for sm_90 and these channels; a line each."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from onehour.rules import kernels

KINDS = dict.fromkeys(("x", "y", "residual", "grad", "masked", "d", "dx"), "*bf16")
COUNTS = ("m", "pixels", "channels", "workers")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(kernel: Any, architecture: int, options: dict[str, Any]) -> dict[str, Any]:
    warps = options.pop("num_warps")
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in options else "i32" if name in COUNTS else KINDS.get(name, "*fp32")
        for name in names
    }
    signature |= {"eps": "fp32"} if "eps" in names else {}
    sixteens = {
        (at,): [["tt.divisibility", 16]] for at, n in enumerate(names) if n == "channels" or "*" in signature[n]
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=options, attrs=sixteens)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        used = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    ptx = built.asm["ptx"]
    return {
        "name": kernel.__name__,
        "loads": sorted(set(re.findall(r"ld\.global[.\w:]*", ptx))),
        "stores": sorted(set(re.findall(r"(?:st|red|atom)\.global[.\w:]*", ptx))),
        "registers": int(re.findall(r"REG:(\d+)", used)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", used)[0]),
    }


if __name__ == "__main__":
    for channels in map(int, sys.argv[2:]):
        for kernel, more in {
            "_moments": (),
            "_normalise": ("relu", "adds", "affine"),
            "_gradient_sums": ("relu", "adds", "affine"),
            "_gradient": ("relu", "affine"),
        }.items():
            _, tile = kernels._launch(32 * 56 * 56, channels, 8, backward=kernel.startswith("_gradient"))
            found = compiled(getattr(kernels, kernel), int(sys.argv[1]), tile | dict.fromkeys(more, True))
            print(json.dumps(found), flush=True)
