"""Rotary embedding and the way into the cache, in the interpreter or on the GPU at hand."""

import math

import pytest
import torch

from kernels.norm import rms_norm
from kernels.rope import RopeScaling, RopeSchedule, rope_ref, rope_table, rope_to_cache
from lab.check import compare, distinct_results, same_bits
from lab.device import current_device
from lab.timing import relative_error

DEVICE = current_device().torch_device
DTYPES = [torch.float16, torch.float32, *[torch.bfloat16] * current_device().is_gpu]
HEADS = (4, 2)


def randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def caches(dtype, head_dim, pages=3, page_size=16, heads=HEADS[1]):
    return [torch.full((pages, page_size, heads, head_dim), float("nan"), dtype=dtype, device=DEVICE) for _ in "kv"]


def case(dtype, head_dim, tokens=5, heads=HEADS):
    qkv = randn(tokens, (heads[0] + 2 * heads[1]) * head_dim, dtype=dtype)
    return qkv, rope_table(64, head_dim, 10_000.0, None, DEVICE), int32([3, 0, 63, 17, 5][:tokens])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 64, 128])
def test_queries_and_keys_turn_and_values_stay(dtype, head_dim):
    qkv, table, positions = case(dtype, head_dim)
    slots, (k_cache, v_cache) = int32([40, 0, 17, -1, 2]), caches(dtype, head_dim)
    q = rope_to_cache(qkv, table, positions, slots, k_cache, v_cache)
    want_q, want_k, want_v = qkv.unflatten(1, (-1, head_dim)).split((HEADS[0], HEADS[1], HEADS[1]), dim=1)
    limit = torch.finfo(dtype).eps
    assert relative_error(q, rope_ref(want_q.double(), table, positions)) <= limit
    kept = slots >= 0
    k, v = (cache.flatten(0, 1)[slots[kept].long()] for cache in (k_cache, v_cache))
    assert relative_error(k, rope_ref(want_k.double(), table, positions)[kept]) <= limit
    assert same_bits(v, want_v[kept])
    for cache in (k_cache, v_cache):
        untouched = torch.ones(48, dtype=torch.bool, device=DEVICE)
        untouched[slots[kept].long()] = False
        assert cache.flatten(0, 1)[untouched].isnan().all(), "a token without a slot, or with another's, was written"


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_head_norms_have_the_bits_of_a_norm_before(dtype):
    qkv, table, positions = case(dtype, 64)
    weights = [1 + randn(64, dtype=dtype, seed=seed) / 8 for seed in (1, 2)]
    slots, fused, apart = int32([0, 1, 2, 3, 4]), caches(dtype, 64), caches(dtype, 64)
    norms = {"q_weight": weights[0], "k_weight": weights[1], "eps": 1e-5}
    q = rope_to_cache(qkv, table, positions, slots, *fused, **norms)
    heads = qkv.unflatten(1, (-1, 64)).clone()
    heads[:, :4] = rms_norm(heads[:, :4], weights[0], 1e-5)
    heads[:, 4:6] = rms_norm(heads[:, 4:6], weights[1], 1e-5)
    assert same_bits(q, rope_to_cache(heads.flatten(1), table, positions, slots, *apart))
    assert all(same_bits(a, b) for a, b in zip(fused, apart, strict=True))


@pytest.mark.parametrize("heads", [(4, 2), (5, 1), (1, 1), (9, 3)])
def test_a_token_keeps_its_bits_in_any_batch_and_schedule(heads):
    qkv, table, positions = case(torch.float16, 64, heads=heads)
    slots = int32([0, 1, 2, 3, 4])
    whole = caches(torch.float16, 64, heads=heads[1])
    q = rope_to_cache(qkv, table, positions, slots, *whole)
    apart = caches(torch.float16, 64, heads=heads[1])
    parts = [rope_to_cache(*(x[i : i + 1] for x in (qkv,)), table, positions[i : i + 1], slots[i : i + 1], *apart)
             for i in range(5)]  # fmt: skip
    assert not compare(torch.cat(parts), q).rows_differing
    assert all(same_bits(a, b) for a, b in zip(whole, apart, strict=True))
    schedules = [RopeSchedule(h, w) for h in (1, 2, 8, 16) for w in (1, 4)]
    groups = distinct_results(lambda s: rope_to_cache(qkv, table, positions, slots, *whole, schedule=s), schedules)
    assert len(groups) == 1


def test_scores_depend_on_the_distance_alone():
    """What the rotation is for: the product of a query and a key is the same wherever the pair stands."""
    table = rope_table(64, 64, 10_000.0, None, DEVICE)
    q, k = randn(1, 1, 64, dtype=torch.float64), randn(1, 1, 64, dtype=torch.float64, seed=1)
    scores = [
        float((rope_ref(q, table, int32([at + 7])) * rope_ref(k, table, int32([at]))).sum()) for at in (0, 20, 50)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-4)


def test_scaling_slows_low_frequencies_and_leaves_high_ones():
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    plain, scaled = (rope_table(2, 128, 500_000.0, s, "cpu")[1] for s in (None, scaling))
    angle = [torch.atan2(t[64:].double(), t[:64].double()) for t in (plain, scaled)]
    turns = 8192 * 500_000.0 ** (-torch.arange(64).double() / 64) / (2 * math.pi)
    ratio = angle[0] / angle[1]
    assert torch.allclose(ratio[turns > 4], torch.ones(()).double())
    assert torch.allclose(ratio[turns < 1], torch.full((), 8.0).double(), rtol=1e-3)
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between)
    assert ((between > 1) & (between < 8)).all()


QKV, TABLE, POSITIONS = torch.zeros(3, 8 * 64), torch.zeros(8, 64), torch.zeros(3, dtype=torch.int32)
CACHE = torch.zeros(2, 16, 2, 64)
GOOD = {"qkv": QKV, "table": TABLE, "positions": POSITIONS, "slots": POSITIONS, "k_cache": CACHE, "v_cache": CACHE}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"qkv": QKV.int()}, TypeError, r"qkv\.dtype=torch\.int32"),
        ({"qkv": QKV[:, :256]}, ValueError, r"qkv\.shape=\(3, 256\)"),
        ({"table": TABLE[:, :63]}, ValueError, "table.shape"),
        ({"table": TABLE.double()}, ValueError, "float64"),
        ({"positions": POSITIONS.long()}, TypeError, "positions.*int64"),
        ({"slots": POSITIONS[:2]}, ValueError, r"slots\.shape=\(2,\)"),
        ({"k_cache": CACHE.half()}, TypeError, r"k_cache\.dtype=torch\.float16"),
        ({"k_cache": CACHE[..., :32]}, ValueError, "k_cache"),
        ({"v_cache": CACHE[:, ::2]}, ValueError, "v_cache"),
        ({"v_cache": CACHE[:1]}, ValueError, "v_cache"),
        ({"q_weight": TABLE[0]}, ValueError, "come together, got k_weight=None"),
        ({"q_weight": TABLE.view(-1)[:128:2], "k_weight": TABLE[0]}, ValueError, r"q_weight\.stride\(\)=\(2,\)"),
        ({"q_weight": TABLE[0], "k_weight": TABLE.view(-1)[:128:2]}, ValueError, r"k_weight\.stride\(\)=\(2,\)"),
        ({"table": [1.0]}, TypeError, "table must be a torch.Tensor, got list"),
        ({"table": TABLE[0]}, ValueError, r"table must be .* got \(64,\) on cpu"),
        ({"table": TABLE.to("meta")}, ValueError, "table must be .* on meta"),
        ({"q_weight": TABLE[0], "k_weight": TABLE[0, :3]}, ValueError, r"k_weight\.shape=\(3,\)"),
    ],
)
def test_bad_arguments_are_named_with_their_value(wrong, error, message):
    with pytest.raises(error, match=message):
        rope_to_cache(**(GOOD | wrong))
