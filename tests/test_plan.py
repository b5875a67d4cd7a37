"""Plans depend on what belongs to the weight and on nothing else."""

import dataclasses
import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import plan
from kernels.norm import tree_sum_ref
from kernels.softmax import plan_softmax


def test_no_plan_can_see_the_batch():
    forbidden = {"m", "rows", "n_rows", "batch", "q_len", "kv_len", "device", "sms", "grid", "schedule"}
    for make in (plan.plan_row, plan.plan_matmul, plan.plan_attention, plan.plan_w8a8, plan_softmax):
        assert not forbidden & set(inspect.signature(make).parameters)


def test_plans_are_values():
    assert plan.plan_row(5120) == plan.RowPlan(n=5120, width=8192)
    assert plan.plan_row(5120).levels == 13
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.plan_row(4).width = 8


@pytest.mark.parametrize("n", [0, -1, plan.MAX_ROW + 1])
def test_a_row_that_does_not_fit_is_refused(n):
    with pytest.raises(ValueError, match=f"n={n}"):
        plan.plan_row(n)


def test_precision_belongs_to_fp32():
    assert plan.plan_matmul(8, 64, 4, "tf32x3").block_k == 64
    assert plan.plan_matmul(8, 64, 4, "tf32").block_k is None
    with pytest.raises(ValueError, match="precision='fast'"):
        plan.plan_matmul(8, 64, 4, "fast")
    with pytest.raises(ValueError, match="precision='tf32'"):
        plan.plan_matmul(8, 64, 2, "tf32")


@pytest.mark.parametrize("head_dim", plan.HEAD_DIMS)
def test_blocks_of_keys_fill_a_chunk_and_fold_to_its_lanes(head_dim):
    made = plan.plan_attention(head_dim, 2)
    assert made.head_dim == head_dim
    assert made.chunk % made.block == made.early_chunk % made.block == made.early % made.early_chunk == 0
    assert made.early % made.chunk == 0
    assert made.block >> made.folds == made.lanes == 8


@given(st.integers(0, 100_000))
def test_every_key_lies_in_the_chunk_that_the_plan_names(position):
    made = plan.plan_attention(128, 2)
    chunk = made.chunk_of(position)
    assert made.start_of(chunk) <= position < made.start_of(chunk + 1)
    assert made.start_of(chunk + 1) - made.start_of(chunk) == (
        made.early_chunk if position < made.early else made.chunk
    )
    assert made.chunks(position + 1) == chunk + 1
    assert made.chunks(0) == 0


@pytest.mark.parametrize(("head_dim", "itemsize", "named"), [(96, 2, "head_dim=96"), (128, 4, "itemsize=4")])
def test_heads_without_a_plan_are_refused(head_dim, itemsize, named):
    with pytest.raises(ValueError, match=named):
        plan.plan_attention(head_dim, itemsize)


@given(st.integers(0, 60_000), st.integers(0, 60_000))
def test_chunks_cover_k_exactly_in_lengths_that_every_step_divides(n, k):
    made = plan.plan_matmul(n, k, 2)
    assert made.chunk_k % plan.CHUNK_UNIT == 0
    assert (made.chunks - 1) * made.chunk_k < max(k, 1)
    assert made.chunks * made.chunk_k >= k


@given(st.integers(-5, 100_000))
def test_next_power_of_2_is_the_smallest(n):
    width = plan.next_power_of_2(n)
    assert width & (width - 1) == 0
    assert width >= n
    assert width == 1 or width // 2 < n


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_the_reference_tree_adds_neighbours_first(values):
    def tree(leaves):
        if len(leaves) == 1:
            return leaves[0]
        return tree([a + b for a, b in zip(leaves[::2], leaves[1::2], strict=True)])

    x = torch.tensor(values, dtype=torch.float32)
    width = plan.plan_row(len(values)).width
    leaves = [*x, *torch.zeros(width - len(values))]
    assert torch.equal(tree_sum_ref(x), tree(leaves)) or tree(leaves).isnan()
