"""Attention, in the interpreter or on the GPU at hand: right, the same by every schedule, strict about arguments.

The interpreter multiplies with NumPy, whose bits may follow the tile. So what is compared bit by bit here has sums
that are exact in any order (`powers_of_two`): a wrong mask, index or merge shows, and an order cannot. Orders are
tested by `test_the_kernel_follows_its_plan` and on GPUs. bfloat16 needs a GPU: the interpreter's dot is wrong there.
"""

import inspect
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention as at
from kernels.attention import (
    AttentionSchedule,
    attention,
    attention_paged,
    attention_ref,
    attention_varlen,
    choose_schedule,
)
from kernels.matmul import has_wgmma
from kernels.plan import HEAD_DIMS, AttentionPlan, plan_attention
from lab.check import distinct_results, same_bits
from lab.device import current_device
from lab.timing import relative_error

DEVICE = current_device().torch_device
ON_GPU = current_device().is_gpu
DTYPES = [torch.bfloat16] if ON_GPU else [torch.float16]
NAN = float("nan")
FEW_SCHEDULES = [None, AttentionSchedule(16, 4, 1), AttentionSchedule(16, 4, 1, split=True, swap=True)]


def all_schedules(head_dim, group=4):
    """Every kind of schedule that the GPU at hand has for heads of this size, ``group`` of which share a key head."""
    tiles = [
        AttentionSchedule(16, 4, 2, swap=True),
        AttentionSchedule(32, 4, 2, swap=True),
        AttentionSchedule(16, 1, 1),
        AttentionSchedule(32, 4, 1),
        AttentionSchedule(64, 8, 2),
    ]
    if head_dim <= 128:
        tiles += [AttentionSchedule(64, 4, 2, swap=True), AttentionSchedule(64, 4, 2), AttentionSchedule(128, 8, 1)]
    if at.shared_bytes(DEVICE) < 163 * 1024:
        tiles = [replace(tile, num_stages=1) for tile in tiles]
    schedules = [replace(tile, split=split) for tile, split in itertools.product(tiles, (False, True))]
    if has_wgmma(torch.device(DEVICE)) and head_dim <= 128:
        schedules.append(AttentionSchedule(128, 8, 2, specialised=True))
        thin = AttentionSchedule(max(16, triton.next_power_of_2(group)), 4, 2, swap=True, specialised=True)
        few = [replace(thin, span=span) for span in (512, 1024, 4096, 1 << 20)]
        few += [replace(thin, block_m=2 * thin.block_m, span=span) for span in (512, 2048)]
        schedules += [schedule for schedule in few if schedule.fits(group, plan_attention(head_dim, 2))]
    return schedules


def randn(*shape, dtype=torch.float16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def qkv(batch, q_len, kv_len, heads_q=1, heads_kv=1, head_dim=64, dtype=torch.float16):
    q = randn(batch, q_len, heads_q, head_dim, dtype=dtype)
    k, v = (randn(batch, kv_len, heads_kv, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    return q, k, v


EXACT = {"scale": math.log(2)}
"""With `powers_of_two`: scores are whole powers of two apart."""


def powers_of_two(batch, q_len, kv_len, heads_q=1, heads_kv=1, head_dim=64, dtype=torch.float16, seed=0):
    """q, k, v whose scores and values are small integers: with EXACT, weights are powers of two, and sums are exact
    in fp32 in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.zeros(batch, q_len, heads_q, head_dim)
    two = torch.randint(head_dim, (batch, q_len, heads_q, 2), generator=generator)
    q.scatter_(-1, two, 1.0)
    shape = batch, kv_len, heads_kv, head_dim
    k = torch.randint(-2, 3, shape, generator=generator)
    v = torch.randint(-4, 5, shape, generator=generator)
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype)


def sdpa(q, k, v, causal=True, window=None, scale=None, kv_lens=None):
    """PyTorch's attention in the dtype of q: the yardstick of accuracy."""
    q_len, kv_len = q.shape[1], k.shape[1]
    lens = torch.full((q.shape[0],), kv_len, device=q.device) if kv_lens is None else kv_lens.long()
    key = torch.arange(kv_len, device=q.device)
    position = lens[:, None, None] - q_len + torch.arange(q_len, device=q.device)[:, None]
    visible = (key < lens[:, None, None]).expand(-1, q_len, -1)
    if causal:
        visible = visible & (key <= position)
    if window is not None:
        visible = visible & (key > position - window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"attn_mask": visible[:, None], "scale": scale, "enable_gqa": True}
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def assert_accurate(out, q, k, v, **options):
    """At most twice the error of PyTorch in the same dtype, with one rounding as a floor."""
    reference = attention_ref(q, k, v, **options)
    limit = max(2 * relative_error(sdpa(q, k, v, **options), reference), torch.finfo(q.dtype).eps)
    assert relative_error(out, reference) <= limit


SMALL_PLAN = AttentionPlan(head_dim=64, chunk=128, block=32, early_chunk=64, early=128)
"""As many borders as the real one has, in a tenth of the length: chunks begin at 0, 64, 128, 256, 384, ..."""


@pytest.fixture
def small_plan(monkeypatch):
    """For the interpreter, which is slow; kernels of a GPU may count on the real plan's blocks."""
    if not ON_GPU:
        monkeypatch.setattr(at, "plan_attention", lambda head_dim, itemsize: replace(SMALL_PLAN, head_dim=head_dim))


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def starts(lengths):
    return int32([0, *itertools.accumulate(lengths)])


def paged(k, v, lens, page_size, spare=3, seed=0):
    """Contiguous k and v (batch, kv_len, ...) as caches of shuffled pages, and their table; the rest is NaN."""
    batch, kv_len = k.shape[:2]
    width = -(-kv_len // page_size)
    pages = batch * width + spare
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))[: batch * width].view(batch, width)
    caches = []
    for x in (k, v):
        cache = torch.full((pages, page_size, *x.shape[2:]), NAN, dtype=x.dtype, device=x.device)
        for b, p in itertools.product(range(batch), range(width)):
            rows = x[b, p * page_size : min((p + 1) * page_size, lens[b])]
            cache[order[b, p], : len(rows)] = rows
        caches.append(cache)
    return *caches, order.to(k.device, torch.int32)


# ------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_schedule_is_right(head_dim, dtype):
    q, k, v = qkv(1, 5, 300, 2, 1, head_dim, dtype)
    for schedule in all_schedules(head_dim):
        assert_accurate(attention(q, k, v, schedule=schedule), q, k, v)


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 1},
        {"window": 70},
        {"window": 199},
        {"window": 10_000},
        {"scale": 0.3},
        {"scale": 1e-6},
        {"kv_lens": [200, 7]},
        {"kv_lens": [1, 199], "causal": False},
    ],
)
def test_masks_and_scales_are_right(options):
    q, k, v = qkv(2, 20, 200, 2, 1)
    if "kv_lens" in options:
        options = options | {"kv_lens": int32(options["kv_lens"])}
    for schedule in FEW_SCHEDULES:
        assert_accurate(attention(q, k, v, schedule=schedule, **options), q, k, v, **options)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 200),
    st.sampled_from([(1, 1), (3, 1), (6, 2), (5, 5)]),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_ragged_sizes_are_right(batch, q_len, kv_len, heads, causal, dtype):
    q, k, v = qkv(batch, q_len, kv_len, *heads, dtype=dtype)
    assert_accurate(attention(q, k, v, causal=causal), q, k, v, causal=causal)


def test_the_reference_is_attention():
    q, k, v = (x.double() for x in qkv(2, 9, 30, 4, 2))
    for options in ({}, {"causal": False}, {"window": 4}, {"scale": 2.0}, {"kv_lens": int32([30, 12])}):
        torch.testing.assert_close(attention_ref(q, k, v, **options), sdpa(q, k, v, **options))


def test_the_log_sum_exp_is_that_of_the_scaled_scores():
    q, k, v = qkv(1, 3, 1100, 4, 2)
    out, lse = attention(q, k, v, causal=False, scale=0.2, return_lse=True)
    scores = torch.einsum("bthd,bkhd->bhtk", q.double(), k.double().repeat_interleave(2, 2)) * 0.2
    assert lse.dtype == torch.float32
    assert lse.shape == (1, 4, 3)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert same_bits(out, attention(q, k, v, causal=False, scale=0.2))


# --------------------------------------------------------------------------------------------------- the plan


def plan_in_numpy(q, k, v, visible, scale, plan):
    """One query row (head_dim,), keys and values (kv_len, head_dim), which of them it sees: the plan written out."""
    f = np.float32
    scale_log2, minus_inf = f(scale * math.log2(math.e)), f(-np.inf)

    def base_of(m):
        return f(0) if m == minus_inf else m

    def fold(x, to):
        while len(x) > to:
            x = x[: len(x) // 2] + x[len(x) // 2 :]
        return x

    m_total, sums_total, acc_total = minus_inf, np.zeros(plan.lanes, f), np.zeros(plan.head_dim, f)
    for chunk in range(plan.chunks(len(k))):
        m, sums, acc = minus_inf, np.zeros(plan.lanes, f), np.zeros(plan.head_dim, f)
        for block in range(plan.start_of(chunk), min(plan.start_of(chunk + 1), len(k)), plan.block):
            keys = slice(block, min(block + plan.block, len(k)))
            s = np.full(plan.block, minus_inf, f)
            s[: keys.stop - keys.start] = np.where(visible[keys], k[keys] @ q, minus_inf)
            values = np.zeros((plan.block, plan.head_dim), f)
            values[: keys.stop - keys.start] = v[keys]
            m_new = max(m, s.max() * scale_log2)
            p = np.exp2(s * scale_log2 - base_of(m_new))
            alpha = np.exp2(m - base_of(m_new))
            sums = sums * alpha + fold(p, plan.lanes)
            acc = acc * alpha + (p.astype(np.float16).astype(f)[:, None] * values).sum(0)
            m = m_new
        m_new = max(m_total, m)
        a, b = np.exp2(m_total - base_of(m_new)), np.exp2(m - base_of(m_new))
        sums_total, acc_total, m_total = sums * b + sums_total * a, acc * b + acc_total * a, m_new
    total = fold(sums_total, 1)[0]
    return acc_total * (f(1) / total) + f(0), (m_total + np.log2(total)) * f(math.log(2))


@pytest.mark.skipif(ON_GPU, reason="a GPU's exp2 is not NumPy's")
@pytest.mark.parametrize(
    ("plan", "q_len", "kv_len", "window"),
    [*[(plan_attention(head_dim, 2), 3, 1024 + 200, None) for head_dim in HEAD_DIMS]]
    + [(SMALL_PLAN, 30, kv_len, window) for kv_len in (128 + 20, 300) for window in (None, 150)],
)
def test_the_kernel_follows_its_plan(plan, q_len, kv_len, window, monkeypatch):
    """Bit by bit against the plan written out in NumPy, through every schedule.

    Scores are sums of integers, and of the values of a block only one in each column is not zero: both products are
    exact whatever the tile, so all that is left is the plan's own order.
    """
    monkeypatch.setattr(at, "plan_attention", lambda head_dim, itemsize: plan)
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-2, 3, (1, q_len, 1, plan.head_dim), generator=generator).half()
    k = torch.randint(-2, 3, (1, kv_len, 1, plan.head_dim), generator=generator).half()
    v = torch.zeros(1, kv_len, 1, plan.head_dim)
    picked = torch.randint(plan.block, (kv_len // plan.block + 1, plan.head_dim), generator=generator)
    for block, row in enumerate(picked):
        at_key = block * plan.block + row
        dims = (at_key < kv_len).nonzero()[:, 0]
        v[0, at_key[dims], 0, dims] = torch.randn(len(dims), generator=generator)
    v = v.half()
    rows, keys, values = (x[0, :, 0].float().numpy() for x in (q, k, v))
    positions, key = np.arange(kv_len - q_len, kv_len), np.arange(kv_len)
    visible = [(key <= at_row) & (key > at_row - (window or kv_len)) for at_row in positions]
    model = [plan_in_numpy(row, keys, values, seen, 0.11, plan) for row, seen in zip(rows, visible, strict=True)]
    want = torch.from_numpy(np.stack([out for out, _ in model])).half()
    want_lse = torch.tensor([lse for _, lse in model])
    for schedule in all_schedules(plan.head_dim):
        out, lse = attention(q, k, v, scale=0.11, window=window, return_lse=True, schedule=schedule)
        assert same_bits(out[0, :, 0], want), schedule
        assert same_bits(lse[0, 0], want_lse), schedule


@pytest.mark.parametrize("swap", [False, True])
def test_weights_are_folded_halves_first(swap):
    @triton.jit
    def fold_kernel(x_ptr, out_ptr, SWAP: tl.constexpr):
        rows, columns, lanes = tl.arange(0, 16), tl.arange(0, 128), tl.arange(0, 8)
        if SWAP:
            x = tl.load(x_ptr + rows[None, :] * 128 + columns[:, None])
            tl.store(out_ptr + rows[None, :] * 8 + lanes[:, None], at.fold(x, 16, 128, 4, SWAP))
        else:
            x = tl.load(x_ptr + rows[:, None] * 128 + columns[None, :])
            tl.store(out_ptr + rows[:, None] * 8 + lanes[None, :], at.fold(x, 16, 128, 4, SWAP))

    x, out = randn(16, 128, dtype=torch.float32), torch.full((16, 8), NAN, device=DEVICE)
    fold_kernel[(1,)](x, out, SWAP=swap)
    want = x
    for _ in range(4):
        want = want[:, : want.shape[1] // 2] + want[:, want.shape[1] // 2 :]
    assert same_bits(out, want)


# ------------------------------------------------------------------------------------------- one row, one result


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 5}, {"window": 140}])
def test_schedules_change_no_bit(options):
    q, k, v = powers_of_two(1, 9, 300, 3, 1)
    groups = distinct_results(lambda s: attention(q, k, v, schedule=s, **EXACT, **options), all_schedules(64))
    assert len(groups) == 1


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (8, 1), (5, 1)])
def test_a_head_does_not_depend_on_its_group(heads):
    """Multi-head, grouped and multi-query: each head as if it were the only one."""
    q, k, v = powers_of_two(1, 3, 140, *heads)
    together = attention(q, k, v, **EXACT)
    for head in range(heads[0]):
        key_head = head // (heads[0] // heads[1])
        alone = attention(q[:, :, [head]], k[:, :, [key_head]], v[:, :, [key_head]], **EXACT)
        assert same_bits(together[:, :, [head]], alone)


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("window", [None, 40])
def test_prefill_chunked_prefill_and_decode_agree(window):
    q, k, v = powers_of_two(1, 150, 150, 2, 1)
    whole = attention(q, k, v, window=window, **EXACT)
    for cut in (1, 2, 31, 32, 33, 127, 128, 129, 149):
        first = attention(q[:, :cut], k[:, :cut], v[:, :cut], window=window, **EXACT)
        rest = attention(q[:, cut:], k, v, window=window, **EXACT)
        assert same_bits(torch.cat((first, rest), 1), whole), cut
    for token in (*range(0, 150, 7), 31, 32, 33, 127, 128, 129, 149):
        alone = attention(q[:, [token]], k[:, : token + 1], v[:, : token + 1], window=window, **EXACT)
        assert same_bits(alone, whole[:, [token]]), token


@pytest.mark.usefixtures("small_plan")
def test_a_sequence_does_not_notice_its_neighbours():
    """Alone, beside long and short ones, and beside ones full of NaN; packed, and in one tensor with `kv_lens`."""
    lens, q_lens = [200, 0, 17, 1, 140], [2, 3, 17, 0, 65]
    q, k, v = powers_of_two(5, 65, 200, 2, 1)
    packed_q = torch.cat([x[:n] for x, n in zip(q, q_lens, strict=True)])
    packed = [torch.cat([x[:n] for x, n in zip(y, lens, strict=True)]) for y in (k, v)]
    alone = [
        attention(q[[b], :m], k[[b], :n], v[[b], :n], return_lse=True, **EXACT)
        for b, (m, n) in enumerate(zip(q_lens, lens, strict=True))
    ]
    cu_q, cu_k = starts(q_lens), starts(lens)
    for schedule in FEW_SCHEDULES:
        options = {"return_lse": True, "schedule": schedule, **EXACT}
        out, lse = attention_varlen(packed_q, *packed, cu_q, cu_k, 65, 200, **options)
        assert same_bits(out, torch.cat([x[0] for x, _ in alone]))
        assert same_bits(lse, torch.cat([x[0] for _, x in alone], 1))
    for b, n in enumerate(lens):
        spoiled = [torch.full_like(x, NAN) for x in (q, k, v)]
        for x, y in zip(spoiled, (q, k, v), strict=True):
            x[b] = y[b]
        spoiled[1][b, n:], spoiled[2][b, n:] = NAN, NAN
        got = attention(*spoiled, kv_lens=int32(lens), **EXACT)[b]
        assert same_bits(got, attention(q[[b]], k[[b], :n], v[[b], :n], **EXACT)[0])


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_a_paged_cache_has_the_bits_of_a_contiguous_one(page_size):
    """Prefill, a chunk and one-token decode in one batch; pages shuffled, everything unused NaN or out of range."""
    lens, q_lens = [200, 129, 33, 1], [1, 65, 5, 1]
    q, k, v = powers_of_two(4, 65, 200, 2, 1)
    k_cache, v_cache, table = paged(k, v, lens, page_size)
    for b, n in enumerate(lens):
        table[b, -(-n // page_size) :] = 10**9
    packed_q = torch.cat([x[:n] for x, n in zip(q, q_lens, strict=True)])
    want = [
        attention(q[[b], :m], k[[b], :n], v[[b], :n], **EXACT)[0]
        for b, (m, n) in enumerate(zip(q_lens, lens, strict=True))
    ]
    for schedule in FEW_SCHEDULES:
        arguments = packed_q, k_cache, v_cache, table, int32(lens), starts(q_lens), 65
        assert same_bits(attention_paged(*arguments, schedule=schedule, **EXACT), torch.cat(want))


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("page_size", [16, 128])
def test_a_prefix_hit_has_the_bits_of_a_prefill(page_size):
    q, k, v = powers_of_two(1, 150, 150, 2, 1)
    whole = attention(q, k, v, **EXACT)[0]
    k_cache, v_cache, table = paged(k, v, [150], page_size)
    for hit in range(0, 150, page_size):
        arguments = q[0, hit:], k_cache, v_cache, table, int32([150]), starts([150 - hit]), 150 - hit
        assert same_bits(attention_paged(*arguments, **EXACT), whole[hit:])


@pytest.mark.usefixtures("small_plan")
def test_one_token_beside_a_long_prefill_keeps_its_mask():
    """Every query of length 1 with a causal mask, then the same beside one of 129: nobody may drop the mask."""
    q, k, v = powers_of_two(3, 129, 200, 2, 1)
    cu_k, keys, values = starts([200, 150, 129]), k.clone(), v.clone()
    packed = [torch.cat((x[0], x[1, :150], x[2, :129])) for x in (keys, values)]
    ones = attention_varlen(q[:, 0], *packed, starts([1, 1, 1]), cu_k, 1, 200, **EXACT)
    mixed_q = torch.cat((q[0, :1], q[1, :1], q[2]))
    mixed = attention_varlen(mixed_q, *packed, starts([1, 1, 129]), cu_k, 129, 200, **EXACT)
    assert same_bits(mixed[:2], ones[:2])
    assert same_bits(mixed[-1:], attention(q[[2], -1:], k[[2], :129], v[[2], :129], **EXACT)[0])
    assert_accurate(mixed[None, 2:], q[[2]], k[[2], :129], v[[2], :129], **EXACT)


def test_pages_before_the_window_may_be_gone():
    """Their entries lead nowhere and the keys that share a block with the window's first are NaN."""
    q, k, v = powers_of_two(1, 1, 1000, 1, 1)
    want = attention(q, k, v, window=70, **EXACT)
    k_cache, v_cache, table = paged(k, v, [1000], 16)
    gone = (1000 - 70) // 16
    for cache in (k_cache, v_cache):
        cache[table[0, :gone].long()] = NAN
    table[0, :gone] = -1
    for schedule in all_schedules(64):
        arguments = q[0], k_cache, v_cache, table, int32([1000]), starts([1]), 1
        assert same_bits(attention_paged(*arguments, window=70, schedule=schedule, **EXACT), want[0])


def test_strides_change_no_bit():
    q, k, v = powers_of_two(2, 20, 150, 4, 2)
    want = attention(q, k, v, **EXACT)

    def sdpa_layout(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def tokens_first(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def sliced(x):
        wide = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 8), NAN, dtype=x.dtype, device=x.device)
        wide[:, :, 2:-1, 8:] = x
        return wide[:, :, 2:-1, 8:]

    def odd_offset(x):
        flat = torch.full((x.numel() + 1,), NAN, dtype=x.dtype, device=x.device)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)

    for layout in (sdpa_layout, tokens_first, sliced, odd_offset):
        out = layout(torch.empty_like(q))
        assert same_bits(attention(layout(q), layout(k), layout(v), out=out, **EXACT), want)
        assert same_bits(out, want)
    repeated = k[:1, :1].expand(2, 150, 2, 64)
    assert same_bits(
        attention(q, repeated, repeated, **EXACT),
        attention(q, repeated.contiguous(), repeated.contiguous(), **EXACT),
    )


@pytest.mark.usefixtures("small_plan")
def test_the_number_of_sms_changes_no_bit(monkeypatch):
    q, k, v = powers_of_two(1, 20, 300, 4, 2)
    results = []
    for sms in (1, 20, 78, 132, 188):
        monkeypatch.setattr(at, "sm_count", lambda device, sms=sms: sms)
        results.append(attention(q, k, v, **EXACT))
    assert all(same_bits(result, results[0]) for result in results)


# ---------------------------------------------------------------------------------------------- hostile values


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("schedule", FEW_SCHEDULES)
def test_rows_that_see_nothing_are_zero(schedule):
    """No keys at all, fewer keys than queries, and a first chunk that a window skips."""
    q, k, v = powers_of_two(1, 20, 300)
    options = {"return_lse": True, "schedule": schedule, **EXACT}
    for causal in (False, True):
        out, lse = attention(q, k[:, :0], v[:, :0], causal=causal, **options)
        assert same_bits(out, torch.zeros_like(out))
        assert lse.eq(-math.inf).all()
    out, lse = attention(q, k[:, :5], v[:, :5], **options)
    assert same_bits(out[:, :15], torch.zeros_like(out[:, :15]))
    assert lse[..., :15].eq(-math.inf).all()
    assert same_bits(out[:, 15:], attention(q[:, 15:], k[:, :5], v[:, :5], **EXACT))
    out, _ = attention(q, k, v, window=3, **options)
    assert_accurate(out, q, k, v, window=3, **EXACT)


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("schedule", FEW_SCHEDULES)
def test_scores_far_below_minus_5e4_do_not_underflow_to_nothing(schedule):
    q, k, v = qkv(1, 4, 300)
    q, k = torch.full_like(q, 250.0), torch.full_like(k, -250.0)
    k[:, 100] = -249.0
    assert_accurate(attention(q, k, v, scale=1.0, schedule=schedule), q, k, v, scale=1.0)


@pytest.mark.usefixtures("small_plan")
@pytest.mark.parametrize("schedule", FEW_SCHEDULES)
def test_infinite_and_nan_scores_stay_in_their_rows_and_are_torchs(schedule):
    q, k, v = qkv(1, 6, 300)
    q[0, 0, 0, 3], q[0, 2, 0, 5], q[0, 4, 0] = math.inf, NAN, -math.inf
    got, want = attention(q, k, v, schedule=schedule), sdpa(q, k, v)
    assert torch.equal(got.isnan(), want.isnan())
    keep = [1, 3, 5]
    assert same_bits(got[:, keep], attention(q.nan_to_num(1, 1, 1), k, v, schedule=schedule)[:, keep])
    key = k.clone()
    key[0, 297] = NAN  # seen by the last three queries
    got = attention(q.nan_to_num(1, 1, 1), key, v, schedule=schedule)
    assert got[0, :, 0, 0].isnan().tolist() == [False] * 3 + [True] * 3


def test_a_key_of_minus_infinity_weighs_nothing():
    q, k, v = qkv(1, 3, 40)
    q = q.abs() + 0.1
    k[0, 7] = -math.inf
    got = attention(q, k, v, causal=False)
    rest = [key for key in range(40) if key != 7]
    assert_accurate(got, q, k[:, rest], v[:, rest], causal=False)


@pytest.mark.usefixtures("small_plan")
def test_zeros_have_one_sign_through_every_schedule():
    """Blocks of masked keys add +0.0 to what may be -0.0; whether a schedule visits them must not show."""
    q, k, v = powers_of_two(1, 9, 300, 2, 1)
    v[..., ::2], v[:, :, :, 1::4] = -0.0, -1.0
    for window in (None, 5):
        groups = distinct_results(
            lambda s, window=window: attention(q, k, v, window=window, schedule=s, **EXACT), all_schedules(64)[::3]
        )
        assert len(groups) == 1
    assert not attention(q, k, v, **EXACT)[..., ::2].signbit().any()
    # What a far larger score shrinks to nothing leaves the sign of its value behind.
    q[...], k[...], v[...] = 8.0, 0.0, -0.0
    k[:, 140:], v[:, :140] = 8.0, -1.0
    groups = distinct_results(lambda s: attention(q, k, v, scale=1.0, schedule=s), all_schedules(64)[::3])
    assert len(groups) == 1
    assert not attention(q, k, v, scale=1.0).signbit().any()


# --------------------------------------------------------------------------------------------------- launching


def test_out_is_written_and_tokens_of_no_sequence_are_left_alone():
    q, k, v = powers_of_two(1, 12, 12, 2, 1)
    out = torch.full_like(q[0], 7.0)
    cu = int32([2, 5, 9])
    returned = attention_varlen(q[0], k[0], v[0], cu, cu, 4, 4, out=out, **EXACT)
    assert returned.data_ptr() == out.data_ptr()
    assert out[[0, 1, 9, 10, 11]].eq(7.0).all()
    assert same_bits(out[2:5], attention(q[:, 2:5], k[:, 2:5], v[:, 2:5], **EXACT)[0])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_batches_have_their_shape(shape):
    batch, q_len, kv_len = shape
    q, k, v = powers_of_two(batch, q_len, kv_len, 4, 2)
    out, lse = attention(q, k, v, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (batch, 4, q_len)
    assert not out.any()


def test_no_sequences_at_all():
    q, k, v = (x[0] for x in powers_of_two(1, 3, 5, 2, 1))
    assert attention_varlen(q[:0], k[:0], v[:0], int32([0]), int32([0]), 0, 0).shape == (0, 2, 64)
    cache = torch.zeros(0, 16, 1, 64, dtype=q.dtype, device=DEVICE)
    table, none = torch.zeros(0, 4, dtype=torch.int32, device=DEVICE), int32([])
    assert attention_paged(q[:0], cache, cache, table, none, int32([0]), 1).shape == (0, 2, 64)


@pytest.mark.usefixtures("small_plan")
def test_counters_are_left_as_they_were_found(monkeypatch):
    q, k, v = powers_of_two(3, 2, 300, 2, 1)
    schedule = AttentionSchedule(16, 4, 1, split=True)
    counters = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    want = attention(q, k, v, schedule=replace(schedule, split=False), **EXACT)
    monkeypatch.setattr(at, "finished_counters", lambda tiles, device: counters)
    for _ in range(3):
        assert same_bits(attention(q, k, v, schedule=schedule, **EXACT), want)
        assert not counters.any()


@pytest.mark.usefixtures("small_plan")
def test_without_counters_chunks_are_taken_in_turn(monkeypatch):
    q, k, v = powers_of_two(3, 2, 300, 2, 1)
    schedule = AttentionSchedule(16, 4, 1, split=True, swap=True)
    want = attention(q, k, v, schedule=schedule, **EXACT)
    monkeypatch.setattr(at, "finished_counters", lambda tiles, device: None)
    assert same_bits(attention(q, k, v, schedule=schedule, **EXACT), want)


@pytest.mark.parametrize("window", [1, 2, 100, 1022, 1023, 1024, 1025, 2048, 2049])
def test_a_window_limits_the_chunks_that_are_launched(window):
    """One too few and keys would be missing, whatever the place of a tile among the chunks."""
    q_len, group, plan = 40, 5, plan_attention(64, 2)
    call = at.AttentionCall(*powers_of_two(1, q_len, 5000, group, 1), None, None, True, window, 1.0, 1, q_len, 5000)
    for block_m in (16, 32, 64, 128):
        most = 0
        for kv_len, first_row in itertools.product(range(3000, 4100), range(0, q_len * group, block_m)):
            first, last = first_row // group, min((first_row + block_m - 1) // group, q_len - 1)
            low, high = max(kv_len - q_len + first - window + 1, 0), kv_len - q_len + last + 1
            most = max(most, plan.chunks(high) - plan.chunk_of(low))
        assert most <= at._most_chunks(call, plan, block_m) <= most + 1


def test_lengths_that_nobody_looked_at_are_cut_to_the_cache():
    q, k, v = powers_of_two(2, 3, 40)
    got = attention(q, k, v, kv_lens=int32([10**6, -5]), validate=False, **EXACT)
    assert same_bits(got[0], attention(q, k, v, **EXACT)[0])
    assert not got[1].any()


def test_default_schedules_are_ones_the_kernel_has():
    rows = (1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 4096)
    budgets = [kilobytes * 1024 for kilobytes in (64, 99, 163, 227)]
    for head_dim, q_len, group, kv_len, sms, shared in itertools.product(
        HEAD_DIMS, rows, (1, 4, 7), (1, 1024, 1025, 10**6), (1, 132), budgets
    ):
        plan = plan_attention(head_dim, 2)
        for batch in (1, 128):
            schedule = choose_schedule(q_len, batch, 8, group, kv_len, plan, sms, shared)
            assert schedule.block_m & (schedule.block_m - 1) == 0
            assert schedule.block_m >= 16
            assert not schedule.split or plan.chunks(kv_len) > 1
            for ragged in (False, True)[: 2 * (head_dim <= 128)]:
                hopper = choose_schedule(q_len, batch, 8, group, kv_len, plan, sms, shared, True, ragged)
                assert hopper.fits(group, plan) == hopper.swap
                assert hopper.swap or q_len > 1
                assert not hopper.swap or q_len <= at.MOST_DECODE_TOKENS
                assert not ragged or (hopper.span or 0) <= at.MOST_UNKNOWN_SPAN


def test_jobs_fill_the_gpu_and_are_no_more_than_that():
    plan = plan_attention(128, 2)
    for batch, kv_len, span, ragged_span in (
        (1, 512, 512, 512),  # one chunk, one job
        (1, 1024, 512, 512),  # 16 jobs: SMs are left idle, so as short as they can be
        (1, 4096, 512, 512),
        (4, 4096, 1024, 512),  # 128 jobs, one for each SM; and two each for half the SMs
        (1, 32768, 2048, 1024),
        (16, 32768, 32768, 4096),  # a tile for each SM
        (64, 8192, 8192, 4096),
    ):
        choices = [
            choose_schedule(1, batch, 8, 4, kv_len, plan, 132, specialised=True, ragged=r).span for r in (0, 1)
        ]
        assert choices == [span, ragged_span], (batch, kv_len)
    for kv_len in (700, 1024, 5000, 40_000):
        assert at.choose_span(132, kv_len, plan, 132, False) >= kv_len, "a job for each SM"
        assert at.choose_span(1000 * 132, kv_len, plan, 132, False) >= kv_len, "nothing to merge"


def test_few_tokens_are_low_tiles_and_many_are_a_prefill():
    plan = plan_attention(128, 2)

    def chosen(q_len, max_kv, batch=1, group=4):
        schedule = choose_schedule(q_len, batch, 32 // group, group, max_kv, plan, 132, specialised=True)
        return schedule.block_m, schedule.swap

    assert chosen(16, 16) == chosen(64, 64) == (16, True)  # 32 and 128 tiles, all at once
    assert chosen(128, 128) == (32, True)  # 256 low tiles would be two rounds
    assert chosen(129, 129) == chosen(4096, 4096) == (128, False)
    assert chosen(8, 4096, batch=16) == (32, True)  # as many high tiles as SMs
    assert chosen(128, 8192, batch=64) == (128, False)
    assert chosen(1, 1000, group=32) == (32, True)
    low = AttentionSchedule(16, 4, 2, swap=True, specialised=True, span=512)
    assert (low.tokens(9, 4), low.query_tiles(9, 4)) == (4, 3)
    assert (low.tokens(1, 4), low.query_tiles(1, 4)) == (1, 1)


@pytest.fixture
def hopper(monkeypatch):
    """The module of Hopper's kernels, its arithmetic as Python."""
    module = pytest.importorskip("kernels.attention_hopper")
    for name in (
        "_chunk_of",
        "_chunk_start",
        "_lengths",
        "_jobs_of",
        "_chunks_of",
        "_blocks_of",
        "_job_at",
        "_tile_of",
    ):
        monkeypatch.setattr(module, name, getattr(module, name).fn)
    return module


@pytest.mark.parametrize("span", [512, 1024, 2048, 3072, 1 << 20])
@pytest.mark.parametrize("window", [None, 1, 700, 5000])
def test_every_block_in_sight_is_in_one_job(span, window, hopper):
    """Jobs of a sequence are its chunks, in order; what they put by lies in one piece behind the first job's."""
    plan, heads_kv, batch = plan_attention(128, 2), 2, 3
    sizes, fine = (plan.chunk, plan.early_chunk, plan.early), span == plan.early_chunk
    for (q_len, tokens), total_kv in itertools.product(
        ((1, 1), (3, 3), (5, 2)), (0, 1, 2, 127, 511, 512, 513, 1024, 1025, 4096, 4097, 5120, 5121, 9000)
    ):
        most_jobs = plan.chunks(total_kv) if fine else -(-total_kv // span)
        q_tiles = -(-q_len // tokens)
        found, where = {}, set()
        for index in range(max(most_jobs, 1) * q_tiles * heads_kv * batch):
            (seq, head, tile, job, exists), sequence, seen, own = hopper._job_at(
                index, q_len, total_kv, None, None, None, heads_kv, batch, q_tiles, tokens, window or 0, span, True,
                window is not None, False, False, False, *sizes, fine,
            )  # fmt: skip
            if exists:
                found.setdefault((tile, sequence), []).append((job, seen, own))
                where.add((seq, head, sequence[0]))
        assert len(found) == len(where) == q_tiles * heads_kv * batch
        for (_, (first_q, first_k, own_q, kv_len)), entries in found.items():
            assert (first_k, own_q, first_q % tokens) == (0, min(tokens, q_len - first_q), 0)
            assert kv_len == max(total_kv - (q_len - first_q - own_q), 0), "up to the last query's own key"
            low = max(kv_len - own_q - window + 1, 0) if window else 0
            first, first_chunk, chunks, jobs = entries[0][1]
            owned = [own for _, _, own in entries]
            assert [job for job, _, _ in entries] == list(range(jobs))
            assert (first, first_chunk) == (low, plan.chunk_of(low))
            assert (owned[0][0], owned[-1][1]) == (first_chunk, chunks)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(owned))
            assert all(end == begin + 1 for begin, end in owned) or not fine
            blocks = [hopper._blocks_of(*own, low, kv_len, *sizes, plan.block) for own in owned]
            assert (blocks[0][0], blocks[-1][1]) == (low // plan.block, -(-kv_len // plan.block))
            assert all(a[1] == b[0] and a[0] < a[1] for a, b in itertools.pairwise(blocks))
            one_by_one = [
                hopper._blocks_of(chunk, chunk + 1, low, kv_len, *sizes, plan.block)
                for begin, end in owned
                for chunk in range(begin, end)
            ]
            assert (one_by_one[0][0], one_by_one[-1][1]) == (blocks[0][0], blocks[-1][1])
            assert all(a[1] == b[0] for a, b in itertools.pairwise(one_by_one))


@pytest.mark.parametrize("together", [1, 4, 12, 16, 24])
def test_every_query_tile_is_visited_once_by_sections_of_heads(together, hopper):
    heads, batch, q_tiles = 8, 3, 5
    order = [hopper._tile_of(tile, heads, batch, q_tiles, together, 128) for tile in range(heads * batch * q_tiles)]
    assert sorted(order) == sorted(itertools.product(range(batch), range(heads), range(0, 128 * q_tiles, 128)))
    for first in range(0, heads * batch, together):
        section = order[first * q_tiles : (first + together) * q_tiles]
        lines = [seq * heads + head for seq, head, _ in section]
        assert set(lines) == set(range(first, min(first + together, heads * batch)))
        assert [start for *_, start in section] == sorted((start for *_, start in section), reverse=True)


def test_sections_are_whole_groups_of_what_the_cache_holds(hopper):
    def together(batch, q_len, kv_len, heads_kv=8):
        q, k = (
            torch.empty(batch, q_len, 32, 128, device="meta"),
            torch.empty(batch, kv_len, heads_kv, 128, device="meta"),
        )
        call = at.AttentionCall(q.half(), k.half(), k.half(), q, None, True, None, 1.0, batch, q_len, kv_len)
        return hopper._heads_together(call)

    assert together(16, 4096, 4096) == 16 * 4  # a key head takes 2 MB
    assert together(4, 4096, 4096) == 32 * 4  # two sections would do: all at once
    assert together(4, 4096, 4096, 32) == 16
    assert together(1, 4096, 4096) == 32  # all there are
    assert together(1, 100, 10**6) == 4  # a group at least
    assert together(16, 8192, 8192) == 16 * 32  # many query tiles: all at once


def test_no_plan_can_see_a_length():
    assert set(inspect.signature(plan_attention).parameters) == {"head_dim", "itemsize"}
    want = AttentionPlan(head_dim=128, chunk=1024, block=128, early_chunk=512, early=4096, lanes=8)
    assert plan_attention(128, 2) == want


# --------------------------------------------------------------------------------------------------- arguments

Q, KV = torch.zeros(2, 3, 4, 64, dtype=torch.float16), torch.zeros(2, 5, 2, 64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q must be a torch.Tensor, got NoneType"),
        ({"q": Q.float()}, TypeError, r"q\.dtype=torch\.float32"),
        ({"k": KV.float()}, TypeError, r"k\.dtype=torch\.float32"),
        ({"v": KV.bfloat16()}, TypeError, r"v\.dtype=torch\.bfloat16"),
        ({"k": KV.to("meta")}, ValueError, r"k\.device=meta"),
        ({"q": Q[0]}, ValueError, r"q\.shape=\(3, 4, 64\)"),
        ({"k": KV[0]}, ValueError, r"k\.shape=\(5, 2, 64\)"),
        ({"v": KV[:, :4]}, ValueError, r"v\.shape=\(2, 4, 2, 64\)"),
        ({"k": KV[:1], "v": KV[:1]}, ValueError, r"q\.shape=\(2, 3, 4, 64\) and k\.shape=\(1, 5, 2, 64\)"),
        ({"q": Q[..., :32]}, ValueError, "q has head_dim=32, k has head_dim=64"),
        ({"q": Q[..., :32], "k": KV[..., :32], "v": KV[..., :32]}, ValueError, "head_dim=32"),
        ({"q": Q[:, :, :3]}, ValueError, "heads_q=3 and heads_kv=2"),
        ({"q": Q[:, :, :1]}, ValueError, "heads_q=1 and heads_kv=2"),
        ({"k": KV[:, :, :0], "v": KV[:, :, :0]}, ValueError, "heads_q=4 and heads_kv=0"),
        ({"q": Q.mT.contiguous().mT}, ValueError, r"of q must lie side by side, got q\.stride\(\)"),
        ({"v": KV.mT.contiguous().mT}, ValueError, r"of v must lie side by side"),
        ({"scale": 0.0}, ValueError, "scale=0.0"),
        ({"scale": -1.0}, ValueError, "scale=-1.0"),
        ({"scale": math.inf}, ValueError, "scale=inf"),
        ({"scale": NAN}, ValueError, "scale=nan"),
        ({"scale": 1e-40}, ValueError, "scale=1e-40"),
        ({"window": 0}, ValueError, "window=0"),
        ({"window": 3, "causal": False}, ValueError, "window=3 needs causal=True"),
        ({"kv_lens": torch.tensor([1, 2])}, TypeError, r"kv_lens\.dtype=torch\.int64"),
        ({"kv_lens": torch.zeros(3, dtype=torch.int32)}, ValueError, r"kv_lens\.shape=\(3,\)"),
        ({"kv_lens": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, r"kv_lens\.device=meta"),
        ({"kv_lens": torch.tensor([6, 1], dtype=torch.int32)}, ValueError, "kv_lens must be between 0 and 5.* is 6"),
        (
            {"kv_lens": torch.tensor([1, -1], dtype=torch.int32)},
            ValueError,
            "kv_lens must be between 0 and 5.* is -1",
        ),
        ({"out": torch.zeros(2, 3, 4, 32).half()}, ValueError, r"out\.shape=\(2, 3, 4, 32\)"),
        ({"out": torch.zeros(2, 3, 4, 64)}, TypeError, r"out\.dtype=torch\.float32"),
        ({"out": Q}, ValueError, "out shares memory with q"),
        ({"out": Q[:1].clone().expand(2, -1, -1, -1)}, ValueError, r"elements of out must not overlap.*\(0, "),
        ({"q": Q.clone().requires_grad_()}, ValueError, r"q\.requires_grad=True"),
        ({"window": 3.5}, TypeError, "window=3.5"),
        ({"window": True}, TypeError, "window=True"),
        ({"out": Q.clone().mT.contiguous().mT}, ValueError, r"of out must lie side by side"),
        ({"schedule": AttentionSchedule(128, 8, 2, specialised=True)}, ValueError, "specialised=True"),
    ],
)
def test_bad_arguments_are_named_with_their_value(change, error, message):
    with pytest.raises(error, match=message):
        attention(**({"q": Q, "k": KV, "v": KV} | change))


PACKED = {
    "q": Q.flatten(0, 1),
    "k": KV.flatten(0, 1),
    "v": KV.flatten(0, 1),
    "cu_q": torch.tensor([0, 3, 6], dtype=torch.int32),
    "cu_k": torch.tensor([0, 5, 10], dtype=torch.int32),
    "max_q": 3,
    "max_k": 5,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q}, ValueError, r"q\.shape=\(2, 3, 4, 64\)"),
        ({"cu_q": [0, 3, 6]}, ValueError, "cu_q must be a tensor"),
        ({"cu_q": torch.tensor([0, 3, 6])}, TypeError, r"cu_q\.dtype=torch\.int64"),
        ({"cu_k": PACKED["cu_k"][:2]}, ValueError, r"cu_k\.shape=\(2,\)"),
        ({"cu_q": torch.tensor([0, 4, 3], dtype=torch.int32)}, ValueError, "cu_q must not decrease.* length -1"),
        ({"cu_q": torch.tensor([0, 3, 7], dtype=torch.int32)}, ValueError, "cu_q must lie within the 6 .* 0 to 7"),
        ({"cu_k": torch.tensor([-1, 4, 8], dtype=torch.int32)}, ValueError, "cu_k must lie within the 10 .* -1 to 8"),
        ({"max_q": 2}, ValueError, "max_q=2 is below the longest sequence of cu_q, 3"),
        ({"max_k": 4}, ValueError, "max_k=4 is below the longest sequence of cu_k, 5"),
        ({"max_q": -1}, ValueError, "max_q=-1"),
    ],
)
def test_bad_packed_arguments_are_named_with_their_value(change, error, message):
    with pytest.raises(error, match=message):
        attention_varlen(**(PACKED | change))


CACHE = torch.zeros(4, 16, 2, 64, dtype=torch.float16)
PAGED = {
    "q": Q[:, 0],
    "k_cache": CACHE,
    "v_cache": CACHE,
    "page_table": torch.tensor([[0, 1, 99], [2, 3, -7]], dtype=torch.int32),
    "kv_lens": torch.tensor([20, 32], dtype=torch.int32),
    "cu_q": torch.tensor([0, 1, 2], dtype=torch.int32),
    "max_q": 1,
}


def changed(name, index, value):
    tensor = PAGED[name].clone()
    tensor[index] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k_cache": CACHE[:, :8], "v_cache": CACHE[:, :8]}, ValueError, r"multiple of 16, got .*\(4, 8, 2, 64\)"),
        ({"k_cache": CACHE[0]}, ValueError, r"k_cache must have 4 axes, got k_cache\.shape=\(16, 2, 64\)"),
        ({"v_cache": CACHE[:3]}, ValueError, r"v_cache\.shape=\(3, 16, 2, 64\)"),
        ({"k_cache": CACHE[..., :32], "v_cache": CACHE[..., :32]}, ValueError, "k_cache has head_dim=32"),
        (
            {"page_table": torch.zeros(6, dtype=torch.int32)},
            ValueError,
            r"page_table must be a tensor of shape .* got shape \(6,\)",
        ),
        ({"page_table": PAGED["page_table"][:1]}, ValueError, r"page_table\.shape=\(1, 3\)"),
        ({"page_table": PAGED["page_table"].t().contiguous().t()}, ValueError, r"page_table\.stride\(\)=\(1, 2\)"),
        ({"page_table": PAGED["page_table"].long()}, TypeError, r"page_table\.dtype=torch\.int64"),
        (changed("page_table", (0, 1), 4), ValueError, "page_table must name pages 0 to 3, but holds 4"),
        (changed("page_table", (1, 0), -1), ValueError, "page_table must name pages 0 to 3, but holds -1"),
        (changed("kv_lens", 1, 33), ValueError, "page_table must name pages 0 to 3, but holds -7"),
        (changed("kv_lens", 0, 49), ValueError, "kv_lens must be between 0 and 48, .* is 49"),
        (changed("kv_lens", 0, -1), ValueError, "kv_lens must be between 0 and 48, .* is -1"),
        ({"cu_q": torch.tensor([0, 2, 1], dtype=torch.int32)}, ValueError, "cu_q must not decrease"),
        ({"cu_q": torch.tensor([0, 1, 3], dtype=torch.int32)}, ValueError, "cu_q must lie within the 2 tokens"),
        ({"max_q": 0}, ValueError, "max_q=0 is below the longest sequence of cu_q, 1"),
        ({"kv_lens": torch.zeros(1, dtype=torch.int32)}, ValueError, r"kv_lens\.shape=\(1,\)"),
        ({"kv_range": (20, 49)}, ValueError, r"kv_range must be .*48 that fit, got kv_range=\(20, 49\)"),
        ({"kv_range": (30, 20)}, ValueError, r"kv_range must be .*got kv_range=\(30, 20\)"),
    ],
)
def test_bad_paged_arguments_are_named_with_their_value(change, error, message):
    with pytest.raises(error, match=message):
        attention_paged(**(PAGED | change))


def test_metadata_of_sequences_without_queries_is_not_looked_at():
    """As in a batch padded for a CUDA graph: their lengths and pages may be anything."""
    change = {"cu_q": [0, 1, 1], "kv_lens": [20, 10**9], "page_table": [[0, 1, 99], [-5, 10**9, 7]]}
    arguments = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in PAGED.items()}
    arguments |= {name: int32(x) for name, x in change.items()}
    assert not attention_paged(**arguments)[0].any()
