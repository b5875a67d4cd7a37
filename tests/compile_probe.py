"""Compile every kernel for GPUs that are not here and print what each needs, as JSON. Run by test_compile.py.

A process of its own, because Triton decides at import whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import itertools
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
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kernels import matmul, matmul_hopper, norm
from kernels.plan import MatmulPlan, plan_matmul, plan_row

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


def specialised_case(schedule: matmul.MatmulSchedule, plan: MatmulPlan):
    kernel = matmul_hopper._matmul_specialised_kernel

    def descriptor(rows: int, columns: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
        return f"tensordesc<bf16[{rows}, {columns}],{layout!r}>"

    s, tail = schedule, schedule.tail_n or schedule.block_n
    boxes = {"a_desc": (s.block_m, s.block_k), "b_desc": (s.block_n, s.block_k), "tail_desc": (tail, s.block_k)}
    boxes |= {"c_desc": (s.block_m, s.block_n), "c_tail_desc": (s.block_m, tail)}
    arguments = {name: descriptor(*box) for name, box in boxes.items()}
    arguments |= {"M": "i32", "N": "i32", "K": "i32", "chunk_k": "i32"}
    constants = {"CHUNKS": plan.chunks, "BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "TAIL_N": s.tail_n}
    constants |= {"BLOCK_K": s.block_k, "STAGES": s.num_stages, "GROUP_M": s.group_m, "num_warps": s.num_warps}
    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    return GluonASTSource(kernel, signature, values, {}), {"num_warps": s.num_warps}


def matmul_case(schedule: matmul.MatmulSchedule, plan: MatmulPlan, dtype: str):
    if schedule.specialised:
        return specialised_case(schedule, plan)
    pointer = TYPES[dtype]
    block = {"BLOCK_M": schedule.block_m, "BLOCK_N": schedule.block_n, "BLOCK_K": schedule.block_k}
    constants = {"HAS_BIAS": True, "PRECISION": plan.precision, "CHUNKS": plan.chunks, "SWAP": schedule.swap, **block}
    constants["GROUP_M"] = schedule.group_m
    arguments = {"bias_ptr": pointer, "c_ptr": pointer, "stride_cm": "i32"}
    arguments |= {"M": "i32", "N": "i32", "K": "i32", "chunk_k": "i32"}
    divisible = {"bias_ptr", "c_ptr", "N", "K", "chunk_k", "stride_cm"}
    if schedule.persistent:
        kernel = matmul._matmul_split_kernel if schedule.split else matmul._matmul_persistent_kernel
        if schedule.split:
            arguments |= {"partial_ptr": "*fp32", "done_ptr": "*i32"}
            divisible |= {"partial_ptr", "done_ptr"}
        else:
            constants["FLATTEN"] = schedule.block_m >= 128 and plan.chunks == 1
        arguments["a_desc"] = f"tensordesc<{dtype}[{schedule.block_m}, {schedule.block_k}]>"
        arguments["b_desc"] = f"tensordesc<{dtype}[{schedule.block_n}, {schedule.block_k}]>"
        constants |= {"A_K_MAJOR": True, "B_K_MAJOR": True}
    else:
        kernel = matmul._matmul_kernel
        arguments |= {"a_ptr": pointer, "b_ptr": pointer, "stride_am": "i32", "stride_bn": "i32"}
        constants |= {"EVEN_K": True, "stride_ak": 1, "stride_bk": 1, "SCALED": False}
        strides = ("stride_batch_a", "stride_batch_b", "stride_batch_c", "stride_bias_m", "stride_bias_n")
        arguments |= dict.fromkeys(strides, "i32") | {"alpha": "fp32", "beta": "fp32"}
        divisible |= {"a_ptr", "b_ptr", "stride_am", "stride_bn"}
    options = {"num_warps": schedule.num_warps, "num_stages": schedule.num_stages}
    return specialised(kernel, arguments, constants, divisible), options


def cases(target: str):
    """(label, source, options) of everything the launchers would run on ``target``."""
    flags = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True}
    for n in (4096, 5120, 8192):
        yield f"rms_norm {n}", *norm_case(norm._rms_norm_kernel, n, "bf16", **flags)
    yield "layer_norm 4096", *norm_case(norm._layer_norm_kernel, 4096, "fp16", HAS_WEIGHT=True, HAS_BIAS=True)
    tma, wgmma, sms = target in TMA_TARGETS, target == "sm_90", 132
    chosen = set()
    for dtype, itemsize, precision in (("bf16", 2, "ieee"), ("fp32", 4, "ieee"), ("fp32", 4, "tf32x3")):
        if target == "gfx942" and precision != "ieee":
            continue  # AMD's matrix cores have no TF32x3
        for m, n in itertools.product((1, 32, 64, 128, 256, 512, 8192), (768, 1536, 4096, 28672)):
            plan = plan_matmul(n, 4096, itemsize, precision)
            for specialised in {False, wgmma and itemsize == 2}:
                schedule = matmul.choose_schedule(m, n, plan, itemsize, tma, sms, specialised)
                chosen.add((schedule, plan, dtype))
    for schedule, plan, dtype in sorted(chosen, key=repr):
        label = f"matmul {dtype} {plan.precision}, {plan.chunks} chunks, {schedule}"
        yield label, *matmul_case(schedule, plan, dtype)


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
