"""Compile every kernel for GPUs that are not here and print what each needs, as JSON. Run by test_compile.py.

A process of its own, because Triton decides at import whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import matmul, norm
from kernels.plan import plan_row

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TMA_TARGETS = ("sm_90", "sm_100")
TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


def specialised(kernel, arguments: dict[str, str], constants: dict, divisible: set[str]) -> ASTSource:
    """The source with types for ``arguments``, values for ``constants``, and 16-divisibility where promised."""
    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    return ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)


def norm_case(kernel, n: int, dtype: str, **flags: bool):
    pointers = {name: TYPES[dtype] for name in kernel.arg_names if name.endswith("_ptr")}
    scalars = {name: "i32" for name in kernel.arg_names if name.startswith("stride") or name == "n_cols"}
    arguments = {**pointers, **scalars, "inv_n_cols": "fp32", "eps": "fp32"}
    plan = plan_row(n)
    constants = {"WIDTH": plan.width, "LEVELS": plan.levels, **flags}
    if "FULL" in kernel.arg_names:
        constants["FULL"] = n == plan.width
    options = {"num_warps": norm.choose_schedule(plan).num_warps, "enable_fp_fusion": False}
    return specialised(kernel, arguments, constants, {*pointers, *scalars}), options


def matmul_case(schedule: matmul.MatmulSchedule, dtype: str, precision: str):
    pointer = TYPES[dtype]
    block = {"BLOCK_M": schedule.block_m, "BLOCK_N": schedule.block_n, "BLOCK_K": schedule.block_k}
    constants = {"HAS_BIAS": True, "PRECISION": precision, "SWAP": schedule.swap, **block}
    constants["GROUP_M"] = schedule.group_m
    arguments = {"bias_ptr": pointer, "c_ptr": pointer, "M": "i32", "N": "i32", "K": "i32", "stride_cm": "i32"}
    divisible = {"bias_ptr", "c_ptr", "N", "K", "stride_cm"}
    if schedule.persistent:
        kernel = matmul._matmul_persistent_kernel
        arguments["a_desc"] = f"tensordesc<{dtype}[{schedule.block_m}, {schedule.block_k}]>"
        arguments["b_desc"] = f"tensordesc<{dtype}[{schedule.block_n}, {schedule.block_k}]>"
        constants |= {"A_K_MAJOR": True, "B_K_MAJOR": True, "FLATTEN": schedule.block_m >= 128}
    else:
        kernel = matmul._matmul_kernel
        arguments |= {"a_ptr": pointer, "b_ptr": pointer, "stride_am": "i32", "stride_bn": "i32"}
        constants |= {"EVEN_K": True, "stride_ak": 1, "stride_bk": 1}
        divisible |= {"a_ptr", "b_ptr", "stride_am", "stride_bn"}
    options = {"num_warps": schedule.num_warps, "num_stages": schedule.num_stages}
    return specialised(kernel, arguments, constants, divisible), options


def cases(target: str):
    """(label, source, options) of everything the launchers would run on ``target``."""
    flags = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True}
    for n in (4096, 5120, 8192):
        yield f"rms_norm {n}", *norm_case(norm._rms_norm_kernel, n, "bf16", **flags)
    yield "layer_norm 4096", *norm_case(norm._layer_norm_kernel, 4096, "fp16", HAS_WEIGHT=True, HAS_BIAS=True)
    tma, sms = target in TMA_TARGETS, 132
    chosen = set()
    for dtype, itemsize, precision in (("bf16", 2, "ieee"), ("fp32", 4, "ieee"), ("fp32", 4, "tf32x3")):
        if target == "gfx942" and precision != "ieee":
            continue  # AMD's matrix cores have no TF32x3
        plan = matmul.plan_matmul(4096, itemsize, precision)
        for m in (1, 32, 64, 128, 256, 8192):
            for n in (4096, 28672):
                chosen.add((matmul.choose_schedule(m, n, plan, itemsize, tma, sms), dtype, precision))
    for schedule, dtype, precision in sorted(chosen, key=repr):
        yield f"matmul {dtype} {precision} {schedule}", *matmul_case(schedule, dtype, precision)


def resources(binary, target: str) -> dict[str, int]:
    """Registers a thread, bytes spilled to local memory, bytes of shared memory."""
    usage = {"shared": binary.metadata.shared}
    if target == "gfx942":
        text = binary.asm["amdgcn"]
        usage["spills"] = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text).group(1))
        usage["registers"] = int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1))
        return usage
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        text = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True).stdout
    usage["registers"] = int(re.search(r"REG:(\d+)", text).group(1))
    usage["spills"] = int(re.search(r"LOCAL:(\d+)", text).group(1))
    return usage


def main(target: str) -> None:
    for label, source, options in cases(target):
        binary = triton.compile(source, target=TARGETS[target], options=options)
        print(json.dumps({"kernel": label, **resources(binary, target)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
