"""On a GPU: the library held to no split-K, digests of replayed products, and a profiler if there is one."""

from __future__ import annotations

import pytest
import torch

from kernels.matmul import MatmulSchedule, matmul, matmul_ref
from lab import counters, digests, peers
from lab.check import same_bits
from lab.cublaslt import Shape, operands
from lab.timing import check_accuracy

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mm_without_split_k_is_right_and_leaves_torch_as_it_was(dtype):
    a, b = operands(Shape(dtype, 4096, 14336), 0, CUDA, 16)
    before = torch.mm(a, b)
    runs, reasons = peers.available({"mm": peers.mm_without_split_k}, a, b)
    if not runs:
        pytest.skip(reasons["mm"])
    check_accuracy("mm_without_split_k", peers.mm_without_split_k(a, b), matmul_ref(a, b))
    assert same_bits(torch.mm(a, b), before)


def test_a_replayed_product_has_the_digest_of_an_eager_one():
    options = {"seed": 1, "device": CUDA, "shapes": digests.SHAPES[-2:], "rows": (1, 100)}
    eager, graph = (list(digests.digests(mm, **options)) for mm in (matmul, digests.replayed))
    assert eager == graph and len({row["digest"] for row in eager}) == len(eager)


def test_the_profiler_sees_the_weight_come_from_memory():
    products = [
        counters.Product("ours", 1, 1024, 2048, MatmulSchedule(16, 64, 64, 4, 3, swap=True)),
        counters.Product("single_tile", 1, 1024, 2048, None),
    ]
    try:
        found = counters.profile(products)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    weight = 2 * 1024 * 2048
    assert all(0.9 * weight <= readings["dram__bytes_read.sum"] < 2 * weight for readings in found)
