"""Compile every kernel for a GPU that is not here, or ``controls``, and print what each needs, as JSON.

Run by test_compile.py.

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
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.language import target_info

from kernels import (
    activation,
    attention,
    attention_hopper,
    matmul,
    matmul_hopper,
    norm,
    quant,
    rope,
    w8a8,
    w8a8_hopper,
)
from kernels.launch import fetch_into_l2, wait_for_previous_launch
from kernels.plan import (
    HEAD_DIMS,
    AttentionPlan,
    MatmulPlan,
    W8A8Plan,
    plan_attention,
    plan_matmul,
    plan_row,
    plan_w8a8,
)
from kernels.wgmma import check_first

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TMA_TARGETS = ("sm_90", "sm_100")
SHARED_KB = {"sm_80": (163, 99), "sm_90": (227,), "sm_100": (227,), "gfx942": (64,)}
"""Shared memory of a program; consumer GPUs have 99 KB and multiply as sm_80 does."""
TOUCHES_MEMORY = r"\b(?:ld|st|red|atom)\.(?:[\w.]*\.)?global|\bcp\.async(?!\.bulk\.prefetch\.L2)"
"""PTX instructions that read or write global memory. To fetch into L2 is neither: L2 is where writes go."""
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


def rope_case(schedule: rope.RopeSchedule, qk_norm: bool):
    """Llama-3's heads; with Qwen3's norm of queries and keys if ``qk_norm``."""
    arguments = {f"{name}_ptr": "*bf16" for name in ("qkv", "q", "k_cache", "v_cache", "q_weight", "k_weight")}
    arguments |= {"table_ptr": "*fp32", "positions_ptr": "*i32", "slots_ptr": "*i32", "eps": "fp32"}
    arguments |= dict.fromkeys(("stride_qkv", "stride_k_slot", "stride_v_slot"), "i32")
    constants = {"HEADS_Q": 32, "HEADS_KV": 8, "HAS_NORM": qk_norm, "HEADS": schedule.heads, "HALF": 64, "LEVELS": 6}
    options = {"num_warps": schedule.num_warps, "enable_fp_fusion": False}
    return specialised(rope._rope_kernel, arguments, constants, {*arguments} - {"eps"}), options


def specialised_case(schedule: matmul.MatmulSchedule, plan: MatmulPlan):
    kernel = matmul_hopper._matmul_specialised_kernel

    def descriptor(rows: int, columns: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
        return f"tensordesc<bf16[{rows}, {columns}],{layout!r}>"

    s = schedule
    left = s.left
    parts = dict(zip(("RIGHT", "TAIL", "REST"), (*s.parts, 0, 0), strict=False))
    turned = slice(None, None, -1 if s.swap else 1)
    arguments, absent = {"left_desc": descriptor(left, s.block_k)}, {}
    sides = {
        "RIGHT": ("right_desc", "c_desc"),
        "TAIL": ("tail_desc", "c_tail_desc"),
        "REST": ("rest_desc", "c_rest_desc"),
    }
    for part, (right, c) in sides.items():
        if width := parts[part]:
            arguments |= {right: descriptor(width, s.block_k), c: descriptor(*(left, width)[turned])}
        else:
            absent |= {right: None, c: None}
    arguments |= {"M": "i32", "N": "i32", "K": "i32", "chunk_k": "i32", "bias_ptr": "*bf16"}
    arguments |= {"blocks_m": "i32", "blocks_n": "i32", "tails": "i32", "early": "i32"}
    constants = {"CHUNKS": plan.chunks, "HAS_BIAS": True, "SPLIT": s.split, "RELAY": s.relay, "SWAP": s.swap}
    constants |= {"LEFT": left, **parts, **absent, "BLOCK_K": s.block_k, "STAGES": s.num_stages}
    constants |= {"WIDE": s.wide, "APART": s.stores_apart, "GROUP_M": s.group_m, "num_warps": s.num_warps}
    if s.split or s.relay:
        arguments |= {"partial_ptr": "*fp32", "done_ptr": "*i32"}
    else:
        constants |= {"partial_ptr": None, "done_ptr": None}
    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    divisible = [names.index(name) for name in ("bias_ptr", "partial_ptr", "done_ptr") if name in arguments]
    attributes = {(index,): [["tt.divisibility", 16]] for index in divisible}
    return GluonASTSource(kernel, signature, values, attributes), {"num_warps": s.num_warps}


def matmul_case(schedule: matmul.MatmulSchedule, plan: MatmulPlan, dtype: str, scaled: bool = False):
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
        arguments |= {"b_ptr": pointer, "stride_bn": "i32", "early": "i32", "ahead": "i32"}
        divisible |= {"b_ptr", "stride_bn"}
    else:
        kernel = matmul._matmul_kernel
        arguments |= {"a_ptr": pointer, "b_ptr": pointer, "stride_am": "i32", "stride_bn": "i32"}
        constants |= {"EVEN_K": True, "stride_ak": 1, "stride_bk": 1, "SCALED": scaled}
        strides = ("stride_batch_a", "stride_batch_b", "stride_batch_c", "stride_bias_m", "stride_bias_n")
        arguments |= dict.fromkeys(strides, "i32") | {"alpha": "fp32", "beta": "fp32"}
        divisible |= {"a_ptr", "b_ptr", "stride_am", "stride_bn"}
    options = {"num_warps": schedule.num_warps, "num_stages": schedule.num_stages}
    return specialised(kernel, arguments, constants, divisible), options


def attention_case(schedule: attention.AttentionSchedule, plan: AttentionPlan, dtype: str, paged: bool):
    """Contiguous and causal, or all at once: paged, with a window and the log-sum-exp."""
    kernel = attention._attention_kernel
    arguments = {name: "*i32" for name in kernel.arg_names if name.endswith("_ptr")}
    arguments |= {f"{name}_ptr": TYPES[dtype] for name in ("q", "k", "v", "out")}
    arguments |= {f"{name}_ptr": "*fp32" for name in ("lse", "part_m", "part_sums", "part_acc")}
    strides = {name: "i32" for name in kernel.arg_names if name.startswith("stride")}
    divisible = {*arguments, *strides} - {"stride_lb", "stride_lh", "stride_pb"}
    arguments |= {**strides, **dict.fromkeys(attention.SIZES, "i32"), "scale_log2": "fp32"}
    flags = {"HAS_WINDOW": paged, "HAS_LENS": paged, "VARLEN": paged, "PAGED": paged, "HAS_LSE": paged}
    constants = {**attention.constants(plan, schedule, schedule.split), "CAUSAL": True, **flags, "PAGE_SIZE": 16}
    options = {"num_warps": schedule.num_warps, "num_stages": schedule.num_stages, "enable_fp_fusion": False}
    return specialised(kernel, arguments, constants, divisible), options


def attention_cases(target: str):
    """Schedules that the launcher would choose for a decode step, a few tokens and a prefill."""
    chosen = set()
    for kilobytes, head_dim, q_len in itertools.product(SHARED_KB[target], HEAD_DIMS, (1, 8, 16, 4096)):
        if head_dim != 128 and q_len in (8, 16):
            continue
        plan = plan_attention(head_dim, 2)
        schedule = attention.choose_schedule(q_len, 1, 8, 4, 4096, plan, 132, kilobytes * 1024)
        for paged in {False, head_dim == 128 and q_len in (1, 4096)}:
            chosen.add((f"attention of {head_dim} for {kilobytes} KB, {paged=}", plan, schedule, paged))
    for label, plan, schedule, paged in sorted(chosen, key=repr):
        yield f"{label}, {schedule}", *attention_case(schedule, plan, "bf16", paged)


def gluon_case(kernel, boxes: dict[str, tuple[int, int]], constants: dict, pointers: dict[str, str]):
    """A Gluon attention kernel: descriptors of ``boxes``, ``pointers`` (``None``: a constant), integers elsewhere."""

    def descriptor(box: tuple[int, int]) -> str:
        layout = gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16)
        return f"tensordesc<bf16[{box[0]}, {box[1]}],{layout!r}>"

    names = kernel.arg_names
    constants = {**constants, **{name: None for name, kind in pointers.items() if kind is None}}
    arguments = dict.fromkeys(set(names) - set(constants), "i32") | {"scale_log2": "fp32"}
    arguments |= {name: kind for name, kind in pointers.items() if kind}
    arguments |= {name: descriptor(box) for name, box in boxes.items()}
    signature = {name: arguments.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": constants["num_warps"], "enable_fp_fusion": False}
    return GluonASTSource(kernel, signature, values, {}), options


def attention_hopper_cases(target: str):
    """Prefill and decode, plain and with everything at once: packed, paged, with a window and the log-sum-exp. Decode
    by single chunks and by more, up to the most rows that a program merges chunks of.
    """
    for head_dim, full in itertools.product((64, 128), (False, True) if target == "sm_90" else ()):
        plan, box = plan_attention(head_dim, 2), 16 if full else 128
        ring = gl.NVMMASharedLayout.get_default_for([plan.block, head_dim], gl.bfloat16)
        index = "*i32" if full else None
        pointers = {"o_ptr": "*bf16", "lse_ptr": "*fp32" if full else None, "cu_q_ptr": index, "cu_k_ptr": None}
        pointers |= {"kv_lens_ptr": index, "page_table_ptr": index}
        constants = {"CAUSAL": True, "WINDOW": full, "VARLEN_Q": full, "VARLEN_K": False, "LENS": full, "PAGED": full}
        constants |= {"HAS_LSE": full, "CHUNK": plan.chunk, "EARLY_CHUNK": plan.early_chunk, "EARLY": plan.early}
        constants |= {"BLOCK_N": plan.block, "BOX": box, "HEAD_DIM": head_dim, "STAGES": 2, "RING_LAYOUT": ring}
        constants |= {"num_warps": 4}
        boxes = {"q_desc": (64, head_dim), "o_desc": (64, head_dim)}
        boxes |= dict.fromkeys(("k_desc", "v_desc"), (box, head_dim))
        rest = {"REST_LAYOUT": attention_hopper._rest_layout(head_dim)}
        prefill = gluon_case(attention_hopper._attention_prefill_kernel, boxes, constants | rest, pointers)
        yield f"attention specialised=True prefill of {head_dim}, {full=}", *prefill
        del boxes["o_desc"]
        pointers |= {"q_ptr": "*bf16", "partial_ptr": "*fp32", "done_ptr": "*i32"}
        most = attention.MOST_MERGING_ROWS
        for fine, rows, used in ((False, 16, 4), (True, 16, 4), (False, most, most)):
            layout = gl.NVMMASharedLayout.get_default_for([plan.block, rows], gl.bfloat16)
            few = {"GROUP": 4, "FINE": fine, "ONE_QUERY": not full, "ROWS": rows, "USED": used, "P_LAYOUT": layout}
            few["AHEAD"] = attention_hopper.chunks_ahead(1 if fine else 99, used * head_dim)
            boxes["q_desc"] = (rows, head_dim)
            decode = gluon_case(attention_hopper._attention_decode_kernel, boxes, constants | few, pointers)
            yield f"attention specialised=True decode of {head_dim}, {full=}, {fine=}, {rows=}", *decode


EIGHT_BIT = {True: "i8", False: "fp8e4nv"}
"""Triton's names of the operands: int8 (exact) or e4m3."""
GLUON_NAMES = {"i8": "int8", "fp8e4nv": "float8e4nv"}


def quant_case(kernel, n: int, exact: bool):
    plan = plan_row(n)
    pointers = {name: TYPES["bf16"] for name in kernel.arg_names if name.endswith("_ptr")}
    pointers |= {"q_ptr": f"*{EIGHT_BIT[exact]}", "scale_ptr": "*fp32"}
    scalars = {name: "i32" for name in kernel.arg_names if name.startswith("stride") or name == "n_cols"}
    constants = {**quant._eight_bits(torch.int8 if exact else torch.float8_e4m3fn), "WIDTH": plan.width}
    arguments = {**pointers, **scalars}
    if kernel is quant._rms_norm_per_token_quant_kernel:
        arguments |= {"inv_n_cols": "fp32", "eps": "fp32"}
        constants |= {"LEVELS": plan.levels, "HAS_RESIDUAL": True, "HAS_WEIGHT": True}
    options = {"num_warps": norm.choose_schedule(plan).num_warps, "enable_fp_fusion": False}
    return specialised(kernel, arguments, constants, {*pointers, *scalars}), options


def w8a8_case(schedule: w8a8.W8A8Schedule, plan: W8A8Plan):
    dtype = EIGHT_BIT[plan.exact]
    arguments = {"scale_a_ptr": "*fp32", "scale_b_ptr": "*fp32", "bias_ptr": "*bf16"}
    arguments |= {"M": "i32", "N": "i32", "K": "i32"}
    if not schedule.specialised:
        s = schedule
        arguments |= {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "c_ptr": "*bf16"}
        arguments |= {"stride_am": "i32", "stride_bn": "i32", "stride_cm": "i32", "stretch_k": "i32"}
        stretches = triton.cdiv(plan.k, plan.promote_k or plan.k)
        constants = {"HAS_BIAS": True, "INT8": plan.exact, "STRETCHES": stretches, "SWAP": s.swap}
        constants |= {"EVEN_K": False, "stride_ak": 1, "stride_bk": 1, "GROUP_M": s.group_m}
        constants |= {"BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k}
        options = {"num_warps": s.num_warps, "num_stages": s.num_stages, "enable_fp_fusion": False}
        return specialised(w8a8._w8a8_kernel, arguments, constants, {*arguments} - {"M"}), options

    def descriptor(name: str, box: tuple[int, int]) -> str:
        short, element = ("bf16", gl.bfloat16) if name.startswith("c_") else (dtype, getattr(gl, GLUON_NAMES[dtype]))
        layout = gl.NVMMASharedLayout.get_default_for(list(box), element)
        return f"tensordesc<{short}[{box[0]}, {box[1]}],{layout!r}>"

    kernel = w8a8_hopper._w8a8_specialised_kernel
    constants, boxes, _ = w8a8_hopper.geometry(plan, schedule)
    arguments |= {name: descriptor(name, box) for name, box in boxes.items()} | {"stretch_k": "i32"}
    constants |= {"HAS_BIAS": True}
    if constants["SPLIT"] > 1:
        arguments |= {"partial_ptr": "*i32" if plan.exact else "*fp32", "done_ptr": "*i32"}
    else:
        constants |= {"partial_ptr": None, "done_ptr": None}
    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    divisible = [name for name in arguments if name.endswith("_ptr") or name in ("N", "K", "stretch_k")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    options = {"num_warps": constants["num_warps"], "enable_fp_fusion": False}
    return GluonASTSource(kernel, signature, values, attributes), options


def w8a8_cases(target: str):
    """The quantisers, and every schedule that the launcher would choose, for each 8-bit type of the target."""
    kernels = {
        "per_token_quant": quant._per_token_quant_kernel,
        "rms_norm_per_token_quant": quant._rms_norm_per_token_quant_kernel,
        "silu_mul_per_token_quant": quant._silu_mul_per_token_quant_kernel,
    }
    silu = {"gate_up_ptr": TYPES["bf16"], "y_ptr": TYPES["bf16"], "stride_gate_up": "i32", "n_cols": "i32"}
    source = specialised(activation._silu_mul_kernel, silu, {"BLOCK": activation.BLOCK}, {*silu})
    yield "silu_mul", source, {"num_warps": 4, "enable_fp_fusion": False}
    for exact in (True, False)[: 1 + (target in TMA_TARGETS)]:  # the other two have no e4m3
        for (name, kernel), n in itertools.product(kernels.items(), (4096, 14336)):
            yield f"{name} {n} {EIGHT_BIT[exact]}", *quant_case(kernel, n, exact)
        chosen = set()
        for promote_k in (None, 128, 512)[: 1 if exact else 3]:
            plan = plan_w8a8(4096, exact, promote_k)
            for m, n, hopper in itertools.product((1, 64, 512, 2048), (4096, 6144), {False, target == "sm_90"}):
                chosen.add((w8a8.choose_schedule(m, n, plan, hopper, 132), plan))
            if target == "sm_90":
                every = [tile for tile, _ in w8a8.WIDE_TILES] + [w8a8.thin_schedule(16, 4096, plan, 132)]
                every += [replace(every[-1], split=2), replace(every[3], swap=True)]
                chosen |= {(schedule, plan) for schedule in every if schedule.fits(plan)}
        for schedule, plan in sorted(chosen, key=repr):
            yield f"w8a8 {EIGHT_BIT[exact]} promoted after {plan.promote_k}, {schedule}", *w8a8_case(schedule, plan)


def cases(target: str):
    """(label, source, options) of everything the launchers would run on ``target``."""
    flags = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True}
    for n in (4096, 5120, 8192):
        yield f"rms_norm {n}", *norm_case(norm._rms_norm_kernel, n, "bf16", **flags)
    for qk_norm in (False, True):
        yield f"rope {qk_norm=}", *rope_case(rope.RopeSchedule(), qk_norm)
    yield "layer_norm 4096", *norm_case(norm._layer_norm_kernel, 4096, "fp16", HAS_WEIGHT=True, HAS_BIAS=True)
    yield from attention_cases(target)
    yield from attention_hopper_cases(target)
    yield from w8a8_cases(target)
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
    for n, swap, split in itertools.product((768, 4096) * wgmma, (False, True), (False, True)):
        schedule = matmul.specialised_schedule(128, 128, 32, swap=swap, split=split and n == 768, relay=True)
        plan = plan_matmul(n, 4096, 2)
        if schedule.fits(plan):
            chosen.add((schedule, plan, "bf16"))
    for *tile, swap in ((64, 256, 16, True), (64, 256, 64, False), (128, 128, 80, False))[: 3 * wgmma]:
        for n in (1280, 4096):
            plan = plan_matmul(n, 4096, 2)
            schedule = matmul.specialised_schedule(*tile, swap=swap)
            if schedule.fits(plan):
                chosen.add((schedule, plan, "bf16"))
    for (dtype, itemsize), m in itertools.product({"bf16": 2, "fp32": 4}.items(), (1, 16, 64, 512)):
        plan = plan_matmul(4096, 1024, itemsize)
        schedule = matmul.choose_schedule(m, 4096, plan, itemsize, False, sms)
        yield f"addmm {dtype}, {schedule}", *matmul_case(schedule, plan, dtype, scaled=True)
    for schedule, plan, dtype in sorted(chosen, key=repr):
        label = f"matmul {dtype} {plan.precision}, {plan.chunks} chunks, {schedule}"
        yield label, *matmul_case(schedule, plan, dtype)


def fused_with(ptx: str, names: list[str], wanted: set[str]) -> list[str]:
    """Which of the ``wanted`` scalars, of a kernel's arguments ``names``, are factors of a fused multiply-add."""
    loads = re.findall(r"ld\.param\.b32\s+(%\w+), \[\w+_param_(\d+)\]", ptx)
    register = {names[int(at)]: name for name, at in loads if int(at) < len(names)}
    factors = {x for pair in re.findall(r"fma\.rn\.f32\s+%\w+, (%\w+), (%\w+), %\w+", ptx) for x in pair}
    assert wanted <= register.keys(), f"no load of {wanted - register.keys()} in the PTX"
    return sorted(name for name in wanted if register[name] in factors)


def waits_first(ptx: str) -> bool:
    """Whether a program waits for the launch before it ahead of whatever touches global memory."""
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    return bool(wait) and not re.search(TOUCHES_MEMORY, before)


@triton.jit
def _never_waits(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


@triton.jit
def _waits_late(x_ptr):
    x = tl.load(x_ptr)
    wait_for_previous_launch()
    tl.store(x_ptr, x + 1)


@triton.jit
def _waits(x_ptr):
    wait_for_previous_launch()
    tl.store(x_ptr, tl.load(x_ptr) + 1)


@triton.jit
def _waits_once_it_has_fetched(x_ptr):
    fetch_into_l2(x_ptr + tl.arange(0, 32) * 4, tl.full((32,), 16, tl.int32))
    wait_for_previous_launch()
    tl.store(x_ptr, tl.load(x_ptr) + 1)


def controls():
    """(label, source, options) of kernels that are known to wait, or not to."""
    for kernel in (_never_waits, _waits_late, _waits, _waits_once_it_has_fetched):
        yield kernel.__name__, specialised(kernel, {"x_ptr": "*fp32"}, {}, set()), {"num_warps": 1}


def resources(binary, target: str) -> dict[str, int]:
    """Registers a thread, spilled registers (AMD) or bytes of stack a thread (Nvidia), bytes of shared memory.

    On Nvidia also whether a program waits for the launch before it ahead of touching global memory.
    """
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
    usage["waits_first"] = waits_first(binary.asm["ptx"])
    usage["registers"] = int(re.search(r"REG:(\d+)", text).group(1))
    usage["stack"] = int(re.search(r"STACK:(\d+)", text).group(1))
    return usage


def accepted(binary, size: int) -> bool:
    """Whether nothing lies in shared memory before byte ``size``, besides one first buffer."""
    try:
        check_first(binary, size)
    except RuntimeError:
        return False
    return True


def instructions(source, binary) -> dict:
    """Widths of the ``wgmma`` of a specialised kernel, and those that its schedule asks for.

    If it has a tail, also whether its ring is accepted as the first buffer in shared memory, and whether one of one
    byte more would be.
    """
    values = {name: source.constants[at,] for at, name in enumerate(source.fn.arg_names) if (at,) in source.constants}
    parts = [width for name in ("RIGHT", "TAIL", "REST") if (width := values[name])]
    dealt = not (values["SPLIT"] or values["RELAY"])
    asked = {sum(parts), *parts[: int(dealt)]} if values["WIDE"] else set(parts)
    widths = {int(width) for width in re.findall(r"mma_async\S+\.m64n(\d+)k16", binary.asm["ptx"])}
    found = {"widths": sorted(widths), "widths_asked": sorted(asked)}
    if len(parts) > 1:
        ring = values["STAGES"] * (values["LEFT"] + sum(parts)) * values["BLOCK_K"] * 2
        found["rings_accepted"] = [accepted(binary, size) for size in (ring, ring + 1)]
    return found


def main(target: str, kernels) -> None:
    target_info.current_target = lambda: TARGETS[target]  # what kernels ask for the GPU at hand
    target_info.current_target.__triton_builtin__ = True
    for label, source, options in kernels:
        binary = triton.compile(source, target=TARGETS[target], options=options)
        found = {"kernel": label, **resources(binary, target)}
        if label.startswith("addmm") and "ptx" in binary.asm:
            names = [name for name in source.fn.arg_names if source.signature[name] != "constexpr"]
            found["fused"] = fused_with(binary.asm["ptx"], names, {"alpha", "beta"})
        if source.fn is matmul_hopper._matmul_specialised_kernel:
            found |= instructions(source, binary)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    wanted = sys.argv[1]
    main("sm_90", controls()) if wanted == "controls" else main(wanted, cases(wanted))
