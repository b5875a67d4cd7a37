"""Attention on a GPU: one row, one result, bit by bit, through every schedule, batch, cache layout and graph."""

import hashlib
import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from test_attention import all_schedules, assert_accurate, int32, paged, starts

from kernels import attention as at
from kernels.attention import AttentionSchedule, attention, attention_paged, attention_ref, attention_varlen
from kernels.plan import plan_attention
from lab.check import check_run_to_run, compare, distinct_results, same_bits
from lab.device import ROOT
from lab.timing import check_accuracy

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
HEADS = [(4, 4), (8, 2), (8, 1), (1, 1)]
NAN = float("nan")


def randn(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def qkv(batch, q_len, kv_len, heads_q=8, heads_kv=2, head_dim=128, dtype=torch.bfloat16):
    """Random, with scores wide enough that the running maximum moves, and zeros of either sign among the values."""
    q, k = randn(batch, q_len, heads_q, head_dim, dtype=dtype), randn(batch, kv_len, heads_kv, head_dim, dtype=dtype)
    v = randn(batch, kv_len, heads_kv, head_dim, dtype=dtype, seed=2)
    k[:, ::37] *= 4
    v[..., ::7], v[..., 3::11] = -0.0, 0.0
    return q, k, v


def assert_same(got, want, what=""):
    difference = compare(got.reshape(-1, got.shape[-1]), want.reshape(-1, want.shape[-1]))
    assert not difference.rows_differing, f"{what}: {difference}"


def with_lse(out, lse):
    """Both results of one call as one tensor: fp32 holds every 16-bit number exactly."""
    return torch.cat((out.float().flatten(), lse.flatten()))


# ------------------------------------------------------------------------------------------------ every schedule

SWEEPS = [
    (torch.bfloat16, 128, {}, 1),
    (torch.float16, 128, {}, 3),
    (torch.bfloat16, 128, {"window": 1500}, 3),
    (torch.bfloat16, 128, {"causal": False, "scale": 0.3}, 3),
    (torch.bfloat16, 64, {}, 2),
    (torch.float16, 64, {"window": 77}, 3),
    (torch.bfloat16, 256, {}, 2),
    (torch.float16, 256, {"causal": False}, 3),
]


DECODES = [
    (torch.bfloat16, 128, 1, (8, 2), {}),
    (torch.float16, 128, 3, (8, 2), {"window": 1500}),
    (torch.bfloat16, 128, 16, (4, 1), {"causal": False}),
    (torch.bfloat16, 64, 1, (4, 4), {}),
    (torch.float16, 64, 5, (8, 1), {"window": 700}),
]


@pytest.mark.parametrize(("dtype", "head_dim", "q_len", "heads", "options"), DECODES)
def test_schedules_are_free_with_few_queries(dtype, head_dim, q_len, heads, options):
    q, k, v = qkv(3, q_len, 5300, *heads, head_dim, dtype)
    schedules = all_schedules(head_dim, heads[0] // heads[1])
    groups = distinct_results(
        lambda s: with_lse(*attention(q, k, v, schedule=s, return_lse=True, **options)), schedules
    )
    assert [len(group) for group in groups.values()] == [len(schedules)], list(groups.values())


@pytest.mark.parametrize(("dtype", "head_dim", "options", "every"), SWEEPS)
def test_schedules_are_free(dtype, head_dim, options, every):
    q, k, v = qkv(2, 70, 5300, head_dim=head_dim, dtype=dtype)
    schedules = all_schedules(head_dim)[::every]
    groups = distinct_results(
        lambda s: with_lse(*attention(q, k, v, schedule=s, return_lse=True, **options)), schedules
    )
    assert [len(group) for group in groups.values()] == [len(schedules)], list(groups.values())


SPANS = [512, 1024, 4096, 1 << 20]
RAGGED = [0, 1, 127, 511, 512, 513, 1024, 1025, 4095, 4096, 4097, 5120, 5121, 9000]


def decoding(span, block_m=16):
    """Hopper's kernel for decoding, or a skip."""
    if not at.has_wgmma(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU")
    return AttentionSchedule(block_m, 4, 2, swap=True, specialised=True, span=span)


@pytest.mark.parametrize("window", [None, 1, 700, 5000])
@pytest.mark.parametrize(("head_dim", "q_len", "heads"), [(128, 1, (8, 2)), (64, 3, (8, 1))])
def test_every_span_has_the_bits_of_the_plain_kernel(head_dim, q_len, heads, window):
    """Each sequence of a length of its own, in one tensor and paged; all of one length."""
    lens = RAGGED * 3
    q, k, v = qkv(len(lens), q_len, max(lens), *heads, head_dim)
    block_m = max(16, triton.next_power_of_2(q_len * heads[0] // heads[1]))
    plain = AttentionSchedule(block_m, 4, 2, swap=True)
    ragged = {"kv_lens": int32(lens), "window": window, "return_lse": True}
    caches = paged(k, v, lens, 32)
    packed = q.flatten(0, 1), *caches, int32(lens), starts([q_len] * len(lens)), q_len
    even = [x[:20, :5300] for x in (q, k, v)]

    def results(schedule):
        return [
            with_lse(*attention(q, k, v, schedule=schedule, **ragged)),
            with_lse(*attention_paged(*packed, window=window, return_lse=True, schedule=schedule)),
            attention(*even, window=window, schedule=schedule),
        ]

    want = results(plain)
    for span in SPANS:
        for what, got, expected in zip(
            ("ragged", "paged", "even"), results(decoding(span, block_m)), want, strict=True
        ):
            assert same_bits(got, expected), f"span {span}, {what}"


@pytest.mark.parametrize("span", SPANS)
def test_a_captured_span_leaves_its_counters_at_zero(span, monkeypatch):
    q, k, v = qkv(5, 1, 9000)
    lens = int32([9000, 600, 0, 4097, 8192])
    schedule = decoding(span)
    eager = attention(q, k, v, kv_lens=lens, schedule=schedule)
    counters = torch.zeros(64, dtype=torch.int32, device="cuda")
    monkeypatch.setattr(at, "finished_counters", lambda tiles, device: counters[:tiles])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(q, k, v, kv_lens=lens, schedule=schedule)
    for _ in range(3):
        captured.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, eager)
        assert not counters.any()


@pytest.mark.parametrize("size", [1, 1 << 20, 3 << 20, 1 << 40])
def test_heads_of_a_prefill_may_come_in_any_sections(size, monkeypatch):
    decoding(512)
    from kernels import attention_hopper

    q, k, v = qkv(3, 1100, 2300)
    want = attention(q, k, v, schedule=AttentionSchedule(64, 4, 2))
    monkeypatch.setattr(attention_hopper, "SECTION_BYTES", size)
    assert_same(attention(q, k, v, schedule=AttentionSchedule(128, 8, 2, specialised=True)), want)


def test_a_span_that_cuts_a_chunk_is_refused():
    q, k, v = qkv(1, 1, 300)
    for schedule in (decoding(256), decoding(None), decoding(1000), decoding(1024, 64)):
        with pytest.raises(ValueError, match=f"span={schedule.span}"):
            attention(q, k, v, schedule=schedule)


def test_schedules_are_free_for_rows_of_any_kind():
    """Rows that see nothing, no whole block, exactly a chunk, one key of the next; infinities and NaN among them."""
    q, k, v = qkv(8, 5, 4200)
    lens = int32([0, 1, 3, 128, 512, 1025, 4096, 4097])
    q[:, 1, 0, 3], q[:, 2, 1, 5], k[:, 40, :, 0] = float("inf"), NAN, -float("inf")
    v[5, 1000], v[6, 1023] = float("inf"), NAN
    groups = distinct_results(
        lambda s: with_lse(*attention(q, k, v, kv_lens=lens, schedule=s, return_lse=True)),
        all_schedules(128)[::2],
    )
    assert len(groups) == 1, list(groups.values())


def test_zeros_have_one_sign_through_every_schedule():
    """A weighted value that a far larger score shrinks to nothing leaves its sign behind, unless 0.0 is added."""
    q, k, v = (torch.full_like(x, fill) for x, fill in zip(qkv(1, 70, 2700), (8.0, 0.0, -0.0), strict=True))
    k[:, 1100:], v[:, :1100] = 8.0, -1.0
    groups = distinct_results(lambda s: attention(q, k, v, scale=1.0, schedule=s), all_schedules(128)[::2])
    assert len(groups) == 1, list(groups.values())
    assert not attention(q, k, v, scale=1.0)[:, -1].signbit().any()


def test_the_number_of_sms_is_free(monkeypatch):
    q, k, v = qkv(2, 20, 5000)
    results = []
    for sms in (1, 20, 78, 132, 188):
        monkeypatch.setattr(at, "sm_count", lambda device, sms=sms: sms)
        results.append(attention(q, k, v))
    assert all(same_bits(result, results[0]) for result in results)


def test_multiplications_of_a_merge_are_fused_where_the_plan_says_so():
    """fma(x, b, y * a): `y * a` is rounded, `x * b` is not. Float64 holds both products exactly."""

    @triton.jit
    def merge_kernel(m_ptr, sums_ptr, acc_ptr, out_ptr, rates_ptr):
        rows, lanes, dims = tl.arange(0, 16), tl.arange(0, 8), tl.arange(0, 64)
        m_all = tl.load(m_ptr + rows)
        m = tl.load(m_ptr + 16 + rows)
        sums_all = tl.load(sums_ptr + rows[:, None] * 8 + lanes[None, :])
        sums = tl.load(sums_ptr + 128 + rows[:, None] * 8 + lanes[None, :])
        acc_all = tl.load(acc_ptr + rows[:, None] * 64 + dims[None, :])
        acc = tl.load(acc_ptr + 1024 + rows[:, None] * 64 + dims[None, :])
        new, _, total = at.merge(m_all, sums_all, acc_all, m, sums, acc, False)
        tl.store(out_ptr + rows[:, None] * 64 + dims[None, :], total)
        tl.store(rates_ptr + rows, tl.exp2(m_all - new))
        tl.store(rates_ptr + 16 + rows, tl.exp2(m - new))

    m, sums, acc = randn(2, 16, dtype=torch.float32), randn(2, 16, 8, dtype=torch.float32), randn(2, 16, 64).float()
    acc = acc * 1.1
    out, rates = torch.empty(16, 64, device="cuda"), torch.empty(2, 16, device="cuda")
    merge_kernel[(1,)](m, sums, acc, out, rates, enable_fp_fusion=False)
    a, b = rates[0, :, None], rates[1, :, None]
    want = (acc[1].double() * b.double() + (acc[0] * a).double()).float()
    assert_same(out, want)


def test_the_same_call_twice_has_the_same_bits():
    q, k, v = qkv(3, 2, 5000)
    for schedule in (None, AttentionSchedule(16, 4, 2, split=True, swap=True)):
        report = check_run_to_run(lambda schedule=schedule: attention(q, k, v, schedule=schedule)[0], runs=20)
        assert report.invariant, report


# -------------------------------------------------------------------- prefill, chunked prefill, decode, one result

CUTS = (1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 1000, 1023, 1024, 1025, 1151, 1152,
        1153, 2047, 2048, 2049, 2199, 4095, 4096, 4097, 5119, 5120, 5121)  # fmt: skip


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("head_dim", "dtype", "window"),
    [(128, torch.bfloat16, None), (64, torch.float16, None), (256, torch.bfloat16, None), (128, torch.float16, 700)],
)
def test_prefill_chunked_prefill_and_decode_agree(head_dim, dtype, window, heads):
    length = 5300 if head_dim == 128 else 2200
    cuts = [cut for cut in CUTS if cut < length]
    q, k, v = qkv(1, length, length, *heads, head_dim, dtype)
    whole = attention(q, k, v, window=window)
    for cut in cuts:
        first = attention(q[:, :cut], k[:, :cut], v[:, :cut], window=window)
        rest = attention(q[:, cut:], k, v, window=window)
        assert_same(torch.cat((first, rest), 1), whole, f"cut at {cut}")
    for step in (5, 100, 333):
        ends = [start + step for start in range(0, length, step)[:60]]
        parts = [attention(q[:, end - step : end], k[:, :end], v[:, :end], window=window) for end in ends]
        got = torch.cat(parts, 1)
        assert_same(got, whole[:, : got.shape[1]], f"chunks of {step}")
    # One token at a time: all tokens as sequences of one batch, then some of them alone.
    every = q[0, :, None], k.expand(length, -1, -1, -1), v.expand(length, -1, -1, -1)
    lens = torch.arange(1, length + 1, dtype=torch.int32, device="cuda")
    assert_same(attention(*every, kv_lens=lens, window=window)[:, 0], whole[0], "a batch of decode steps")
    for token in (*range(0, length, 97), *cuts):
        got = attention(q[:, [token]], k[:, : token + 1], v[:, : token + 1], window=window)
        assert_same(got[0], whole[0, [token]], f"token {token} alone")


@pytest.mark.parametrize("schedule", [None, *all_schedules(128)[::5]])
def test_decode_step_by_step_is_the_prefill(schedule):
    q, k, v = qkv(1, 1300, 1300)
    whole = attention(q, k, v)
    for token in range(0, 1300, 1 if schedule is None else 7):
        got = attention(q[:, [token]], k[:, : token + 1], v[:, : token + 1], schedule=schedule)
        assert_same(got[0], whole[0, [token]], f"token {token}")


# ------------------------------------------------------------------------------- neighbours, packing and pages

LENS, Q_LENS = [2100, 0, 17, 1, 300, 5000, 129, 1024], [1, 3, 17, 1, 129, 1, 0, 300]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_notice_its_neighbours(dtype, heads):
    """Alone, packed beside long and short ones, in every order, and beside ones full of NaN."""
    q, k, v = qkv(len(LENS), max(Q_LENS), max(LENS), *heads, dtype=dtype)
    alone = [
        attention(q[[b], :m], k[[b], :n], v[[b], :n], return_lse=True)
        for b, (m, n) in enumerate(zip(Q_LENS, LENS, strict=True))
    ]
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [5, 4, 7, 0, 1, 3, 6, 2], [3, 0], [4, 3], [2, 5, 2]):
        q_lens, lens = [Q_LENS[b] for b in order], [LENS[b] for b in order]
        packed = [
            torch.cat([x[b, :n] for b, n in zip(order, sizes, strict=True)])
            for x, sizes in ((q, q_lens), (k, lens), (v, lens))
        ]
        arguments = *packed, starts(q_lens), starts(lens), max(q_lens), max(lens)
        out, lse = attention_varlen(*arguments, return_lse=True)
        assert_same(out, torch.cat([alone[b][0][0] for b in order]), f"order {order}")
        assert_same(lse.t(), torch.cat([alone[b][1][0].t() for b in order]), f"log-sum-exp, order {order}")
    for b in (0, 2, 5):
        spoiled = [torch.full_like(x, NAN) for x in (q, k, v)]
        for x, y in zip(spoiled, (q, k, v), strict=True):
            x[b] = y[b]
        spoiled[1][b, LENS[b] :], spoiled[2][b, LENS[b] :] = NAN, NAN
        got = attention(*spoiled, kv_lens=int32(LENS))[b]
        assert_same(got, attention(q[[b]], k[[b], : LENS[b]], v[[b], : LENS[b]])[0], f"NaN around {b}")


@pytest.mark.parametrize(
    ("page_size", "head_dim", "dtype", "window"),
    [
        (16, 128, torch.bfloat16, None),
        (64, 128, torch.float16, None),
        (256, 128, torch.bfloat16, None),
        (48, 64, torch.bfloat16, None),
        (16, 256, torch.float16, None),
        (32, 128, torch.bfloat16, 200),
    ],
)
def test_a_paged_cache_has_the_bits_of_a_contiguous_one(page_size, head_dim, dtype, window):
    """Prefill, chunks and decode in one batch; pages shuffled twice; all that is unused NaN or out of range."""
    q, k, v = qkv(len(LENS), max(Q_LENS), max(LENS), head_dim=head_dim, dtype=dtype)
    want = [
        attention(q[[b], :m], k[[b], :n], v[[b], :n], window=window)[0]
        for b, (m, n) in enumerate(zip(Q_LENS, LENS, strict=True))
    ]
    packed_q = torch.cat([x[:n] for x, n in zip(q, Q_LENS, strict=True)])
    for seed in (0, 1):
        k_cache, v_cache, table = paged(k, v, LENS, page_size, seed=seed)
        for b, n in enumerate(LENS):
            table[b, -(-n // page_size) :] = 2**31 - 1
        arguments = packed_q, k_cache, v_cache, table, int32(LENS), starts(Q_LENS), max(Q_LENS)
        assert_same(attention_paged(*arguments, window=window), torch.cat(want))
    decode = [b for b, m in enumerate(Q_LENS) if m == 1]
    arguments = q[decode, 0], k_cache, v_cache, table[decode], int32([LENS[b] for b in decode])
    got = attention_paged(*arguments, starts([1] * len(decode)), 1, window=window)
    assert_same(got, torch.cat([want[b] for b in decode]), "decode steps alone")


def test_what_is_known_of_the_lengths_changes_the_schedule_and_no_bit(monkeypatch):
    """Also where it is wrong: it is a hint."""
    q, k, v = qkv(16, 1, 9000)
    lens = [9000 - 500 * b for b in range(16)]
    k_cache, v_cache, table = paged(k, v, lens, 16)
    arguments = q[:, 0], k_cache, v_cache, table, int32(lens), starts([1] * 16), 1
    chosen, choose = [], at.choose_schedule
    monkeypatch.setattr(at, "choose_schedule", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    want = attention_paged(*arguments)
    for kv_range in ((1500, 9000), (9000, 9000), (0, 0), (1, 600)):
        assert_same(attention_paged(*arguments, kv_range=kv_range), want, str(kv_range))
    assert len({schedule.span for schedule in chosen}) > 1


def test_pages_before_the_window_may_be_gone():
    q, k, v = qkv(1, 1, 3000)
    want = attention(q, k, v, window=1100)[0]
    k_cache, v_cache, table = paged(k, v, [3000], 16)
    gone = (3000 - 1100) // 16
    for cache in (k_cache, v_cache):
        cache[table[0, :gone].long()] = NAN
    table[0, :gone] = -1
    for schedule in (None, *all_schedules(128)[::3]):
        arguments = q[0], k_cache, v_cache, table, int32([3000]), starts([1]), 1
        assert_same(attention_paged(*arguments, window=1100, schedule=schedule), want, schedule)


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_prefix_hit_has_the_bits_of_a_prefill(page_size):
    length = 2100
    q, k, v = qkv(1, length, length)
    whole = attention(q, k, v)[0]
    k_cache, v_cache, table = paged(k, v, [length], page_size)
    for hit in range(0, length, page_size):
        arguments = q[0, hit:], k_cache, v_cache, table, int32([length]), starts([length - hit]), length - hit
        assert_same(attention_paged(*arguments), whole[hit:], f"{hit} tokens cached")


def test_one_token_beside_a_long_prefill_keeps_its_mask():
    """Every query of length 1 with a causal mask, then the same beside one of 129: nobody may drop the mask."""
    lens, q_lens = [2000, 1500, 129], [1, 1, 129]
    q, k, v = qkv(3, 129, 2000)
    packed = [torch.cat([x[b, :n] for b, n in enumerate(lens)]) for x in (k, v)]
    ones = attention_varlen(q[:, 0], *packed, starts([1, 1, 1]), starts(lens), 1, 2000)
    mixed_q = torch.cat([x[:n] for x, n in zip(q, q_lens, strict=True)])
    mixed = attention_varlen(mixed_q, *packed, starts(q_lens), starts(lens), 129, 2000)
    assert_same(mixed[:2], ones[:2])
    assert_same(mixed[2:], attention(q[[2]], k[[2], :129], v[[2], :129])[0])
    assert_accurate(mixed[None, 2:], q[[2]], k[[2], :129], v[[2], :129])


# ----------------------------------------------------------------------------------------------------- sizes


def test_more_programs_than_65535():
    """More sequences, more query tiles, and more heads than an axis of a CUDA grid past the first could count."""
    q, k, v = qkv(70_000, 1, 3, 1, 1, 64)
    out = attention(q, k, v)
    for part in (slice(0, 5), slice(65_530, 65_540), slice(-5, None)):
        assert_same(out[part], attention(q[part], k[part], v[part]))
    q, k, v = qkv(1, 3, 5, 70_000, 70_000, 64)
    out = attention(q, k, v)
    for part in (slice(0, 5), slice(-5, None)):
        assert_same(out[:, :, part], attention(q[:, :, part], k[:, :, part], v[:, :, part]))
    q, k, v = qkv(1, 1_200_000, 3, 1, 1, 64)
    out = attention(q, k, v, causal=False, schedule=AttentionSchedule(16, 4, 1))
    assert_same(out[:, -5:], attention(q[:, -5:], k, v, causal=False))


def test_caches_past_2_31_elements():
    """Pages, and keys of one sequence, that an int32 offset cannot reach."""
    pages, page_size, heads, head_dim = 2**31 // (16 * 8 * 128) + 100, 16, 8, 128
    cache = torch.zeros(pages, page_size, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    cache[-100:] = randn(100, page_size, heads, head_dim)
    q = randn(1, 1, 16, head_dim)
    table = torch.arange(pages - 80, pages, dtype=torch.int32, device="cuda")[None]
    contiguous = cache[-80:].view(1, -1, heads, head_dim)
    got = attention_paged(q[0], cache, cache, table, int32([80 * 16]), starts([1]), 1)
    assert_same(got, attention(q, contiguous, contiguous)[0])
    flat = cache.view(1, -1, heads, head_dim)
    first = (flat.shape[1] - 6000) // 1024 * 1024  # so that the last keys lie in the chunks that they lay in
    got = attention(q, flat, flat, window=1200)
    assert_same(got, attention(q, flat[:, first:], flat[:, first:], window=1200))


# ----------------------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize("split", [None, False, True])
def test_a_graph_captured_large_replays_small(split):
    """Mixed batches through one graph: metadata of what is not there is poison, and nobody reads it."""
    batch, max_q, page_size, width = 6, 40, 16, 160
    q, k, v = qkv(batch, max_q, page_size * width)
    capacity = [page_size * width] * batch
    k_cache, v_cache, full_table = paged(k, v, capacity, page_size)
    schedule = None if split is None else AttentionSchedule(32, 4, 2, split=split, swap=True)
    table, lens = full_table.clone(), int32(capacity)
    cu_q, packed_q = starts([max_q] * batch), q.flatten(0, 1).clone()
    arguments = packed_q, k_cache, v_cache, table, lens, cu_q, max_q
    attention_paged(*arguments, schedule=schedule)  # compiles, and sets counters by
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_paged(*arguments, schedule=schedule)
    cases = [
        ([40] * 6, capacity),
        ([1, 1, 1, 1, 1, 1], [1, 2560, 1024, 1025, 33, 700]),
        ([40, 1, 3], [40, 2000, 3]),
        ([1], [1500]),
        ([1, 0, 7], [0, 5, 1200]),
    ]
    for q_lens, kv_lens in cases * 2:
        count = len(q_lens)
        out.fill_(NAN)
        packed_q.fill_(NAN)
        table.fill_(2**31 - 1)
        lens.fill_(-(2**31))
        rows = torch.cat([q[b, :m] for b, m in enumerate(q_lens)])
        packed_q[: len(rows)] = rows
        cu_q.copy_(starts(q_lens + [0] * (batch - count)))
        lens[:count] = int32(kv_lens)
        for b, n in enumerate(kv_lens):
            table[b, : -(-n // page_size)] = full_table[b, : -(-n // page_size)]
        graph.replay()
        torch.cuda.synchronize()
        want = [
            attention(q[[b], :m], k[[b], :n], v[[b], :n])[0]
            for b, (m, n) in enumerate(zip(q_lens, kv_lens, strict=True))
        ]
        assert_same(out[: len(rows)], torch.cat(want), f"{q_lens} queries, {kv_lens} keys")
        assert out[len(rows) :].isnan().all()


def test_a_captured_split_keeps_counters_of_its_own():
    q, k, v = qkv(2, 1, 5000)
    schedule = AttentionSchedule(16, 4, 2, split=True, swap=True)
    eager = attention(q, k, v, schedule=schedule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [attention(q, k, v, schedule=schedule) for _ in range(2)]
    for _ in range(2):
        for out in captured:
            out.fill_(NAN)
        graph.replay()
        assert_same(attention(q, k, v, schedule=schedule), eager)
        torch.cuda.synchronize()
        for out in captured:
            assert_same(out, eager)


def test_without_counters_a_captured_split_takes_the_chunks_in_turn(monkeypatch):
    q, k, v = qkv(2, 1, 5000)
    schedule = AttentionSchedule(16, 4, 2, split=True, swap=True)
    eager = attention(q, k, v, schedule=schedule)
    attention(q, k, v, schedule=replace(schedule, split=False))  # compiled before the capture
    monkeypatch.setattr(at, "finished_counters", lambda tiles, device: None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(q, k, v, schedule=schedule)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, eager)


# -------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", HEADS)
def test_errors_are_at_most_twice_those_of_pytorch(heads, head_dim, dtype):
    for q_len, kv_len, options in (
        (700, 700, {}),
        (1, 3000, {}),
        (33, 2500, {}),
        (300, 300, {"causal": False}),
        (400, 1500, {"window": 500}),
    ):
        q, k, v = qkv(2, q_len, kv_len, *heads, head_dim, dtype)
        assert_accurate(attention(q, k, v, **options), q, k, v, **options)


def test_a_long_sequence_is_accurate():
    q, k, v = qkv(1, 300, 40_000)
    check_accuracy("attention", attention(q, k, v), attention_ref(q, k, v))


# ------------------------------------------------------------------------------------------- negative controls


def test_chunk_and_block_belong_to_the_plan(monkeypatch):
    """Whoever let them follow the batch would be caught."""
    q, k, v = qkv(1, 20, 6000)
    made, schedule = plan_attention(128, 2), AttentionSchedule(16, 4, 2, swap=True)
    results = [attention(q, k, v, schedule=schedule)]
    for other in (replace(made, chunk=512), replace(made, early_chunk=1024), replace(made, block=64)):
        monkeypatch.setattr(at, "plan_attention", lambda head_dim, itemsize, other=other: other)
        results.append(attention(q, k, v, schedule=schedule))
    assert all(compare(a[0], b[0]).rows_differing for a, b in itertools.combinations(results, 2))


def test_a_plan_that_follows_the_batch_is_caught(monkeypatch):
    q, k, v = qkv(3, 4, 4000)
    schedule = AttentionSchedule(16, 4, 2, swap=True)
    whole, other = attention(q, k, v, schedule=schedule), replace(plan_attention(128, 2), early_chunk=1024)
    monkeypatch.setattr(at, "plan_attention", lambda head_dim, itemsize: other)
    for b in range(3):
        assert compare(attention(q[[b]], k[[b]], v[[b]], schedule=schedule)[0], whole[b]).rows_differing


def test_pytorch_attention_is_caught():
    """Prefill against decode, for whichever kernel PyTorch takes."""
    q, k, v = (x.transpose(1, 2) for x in qkv(1, 2048, 2048, 32, 8))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    whole = sdpa(q, k, v, is_causal=True, enable_gqa=True)
    differing = 0
    for token in range(1, 2048, 61):
        keys = slice(0, token + 1)
        got = sdpa(q[:, :, [token]], k[:, :, keys], v[:, :, keys], enable_gqa=True)
        differing += compare(got[0, :, 0], whole[0, :, token]).rows_differing
    assert differing


DIGEST = """
import hashlib, torch, lab
from kernels.attention import attention
from lab.check import bits
generator = torch.Generator().manual_seed(0)
sizes = (9, 8), (3000, 2), (3000, 2)
q, k, v = (torch.randn(2, n, heads, 128, generator=generator).bfloat16().cuda() for n, heads in sizes)
out = torch.cat((attention(q, k, v), attention(q[:, :1], k, v)), 1)
print(hashlib.sha256(bits(out).cpu().numpy().tobytes()).hexdigest())
"""


def test_two_fresh_processes_agree():
    digests = {
        subprocess.run([sys.executable, "-c", DIGEST], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == len(hashlib.sha256().hexdigest())
