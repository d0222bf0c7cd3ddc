"""Kernels compiled for GPUs that are not here: the launches are recorded, never run."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

BIN = Path(nvidia.__file__).parent / "bin"
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Compiled:
    """What the machine code asks of a multiprocessor; bytes, registers per thread."""

    name: str
    ptx: str
    registers: int
    spilled: int
    shared: int

    @property
    def bulk_copies(self) -> bool:
        return "cp.async.bulk.tensor" in self.ptx

    @property
    def warp_group_products(self) -> bool:
        return "wgmma.mma_async" in self.ptx

    @property
    def tensor_memory_products(self) -> bool:
        return "tcgen05.mma" in self.ptx

    @property
    def specialised(self) -> bool:
        return "setmaxnreg" in self.ptx


@contextmanager
def recorded_launches(monkeypatch, *modules, capability, processors=132):
    """The list of (kernel, arguments, options) that the modules would start on such a device."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda kernel, *a, **o: seen.append((kernel, a, o)))
        from localflash import triton_tools

        device = triton_tools.Device(capability, processors)
        for module in modules:
            patch.setattr(module, "device_of", lambda _: device)
        yield seen


def compiled(launch, capability: int) -> Compiled:
    """A recorded launch, specialised as Triton would, compiled for sm_`capability`."""
    kernel, arguments, options = launch
    options = {k: v for k, v in options.items() if k not in ("grid", "warmup")}
    signature, constants, aligned = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[name] = options[name]
            continue
        value = arguments[index]
        if parameter.do_not_specialize:
            signature[name] = _type(value, of_its_own=False)
            continue
        signature[name] = _type(value)
        if signature[name] == "constexpr":
            constants[name] = value
        elif _aligned(value):
            aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    chosen = {key: options[key] for key in OPTIONS if key in options}
    result = triton.compile(source, target=target, options=chosen)
    registers, spilled = _resources(result.asm["ptx"])
    return Compiled(
        kernel.fn.__name__, result.asm["ptx"], registers, spilled, result.metadata.shared
    )


def _type(value, *, of_its_own: bool = True) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or (
        value == 1 and of_its_own
    ):  # Triton makes a kernel of its own for a stride of 1
        return "constexpr"
    return "i32" if abs(value) < 2**31 else "i64"


def _aligned(value) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def _resources(ptx: str) -> tuple[int, int]:
    """(registers of a thread, bytes of them that it spills), as the assembler reports them."""
    (architecture,) = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    tool = max(BIN.glob("ptxas*"))  # the one with the longer name knows the newer cards too
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        asked = [str(tool), "-v", f"-arch={architecture}", file.name, "-o", os.devnull]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", said)
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    return int(registers), int(spilled)
