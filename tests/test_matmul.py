"""Matmul, in the interpreter or on the GPU at hand: right for every layout and size, strict about arguments.

The interpreter multiplies with NumPy, whose bits may follow the tile: that schedules are free is tested on GPUs.
bfloat16 needs one too, because the interpreter's dot is wrong there.
"""

import inspect
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import matmul as mm
from kernels.matmul import MatmulSchedule, addmm, choose_schedule, matmul, matmul_ref, specialised_schedule
from kernels.plan import plan_matmul
from lab import peers
from lab.check import check_invariance, same_bits
from lab.device import current_device

DEVICE = current_device().torch_device
DTYPES = [torch.float16, torch.float32, *[torch.bfloat16] * current_device().is_gpu]
SCHEDULES = [
    MatmulSchedule(32, 32, 32, 4, 3),
    MatmulSchedule(16, 64, 32, 4, 3, swap=True),
    MatmulSchedule(32, 64, 32, 4, 3, persistent=True),
    MatmulSchedule(16, 32, 64, 4, 3, swap=True, persistent=True, group_m=2),
    MatmulSchedule(16, 32, 64, 4, 3, swap=True, persistent=True, early=True, ahead=40),
]


def matrix(rows, columns, dtype, layout="rows", seed=0):
    """Random matrix; ``columns`` layout has its columns side by side in memory, ``strided`` neither."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    if layout == "columns":
        return x.t().contiguous().t()
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x


def assert_accurate(c, a, b, bias=None):
    """Within one epsilon of the sum of magnitudes |a| |b|: a result that cancels to nothing has no better digits."""
    magnitude = matmul_ref(a.abs(), b.abs(), None if bias is None else bias.abs())
    assert (c.double() - matmul_ref(a, b, bias)).norm() <= torch.finfo(a.dtype).eps * magnitude.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
def test_every_schedule_is_right(schedule, dtype):
    a, b = matrix(37, 96, dtype), matrix(96, 80, dtype, "columns", seed=1)
    assert_accurate(matmul(a, b, schedule=schedule), a, b)


@pytest.mark.parametrize("a_layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("b_layout", ["rows", "columns", "strided"])
def test_every_layout_is_right(a_layout, b_layout):
    a, b = matrix(20, 40, torch.float16, a_layout), matrix(40, 24, torch.float16, b_layout, seed=1)
    bias = matrix(1, 48, torch.float16, seed=2)[0, ::2]
    assert_accurate(matmul(a, b, bias), a, b, bias)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 90), st.sampled_from(DTYPES))
def test_ragged_sizes_are_right(m, n, k, dtype):
    a, b = matrix(m, k, dtype), matrix(k, n, dtype, seed=1)
    assert_accurate(matmul(a, b), a, b)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (0, 0, 0)])
def test_empty_results_have_their_shape(sizes):
    m, n, k = sizes
    c = matmul(matrix(m, k, torch.float32), matrix(k, n, torch.float32))
    assert c.shape == (m, n)


def test_an_empty_sum_is_zero_or_the_bias():
    a, b, bias = matrix(3, 0, torch.float32), matrix(0, 2, torch.float32), matrix(1, 2, torch.float32)[0]
    assert torch.equal(matmul(a, b), torch.zeros(3, 2, device=DEVICE))
    assert torch.equal(matmul(a, b, bias), bias.expand(3, 2))


def test_ieee_keeps_integers_to_2_24_exact():
    a = torch.tensor([[2.0**24, 1.0], [2049.0, -1.0]], device=DEVICE)
    b = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], device=DEVICE)
    assert matmul(a, b).tolist() == [[2.0**24 - 1, 1 - 2.0**24], [2050.0, -2050.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fn", [matmul, peers.single_tile])
def test_rows_do_not_leak_into_each_other(fn, dtype):
    """On small integers, whose sums are exact: NumPy's dot rounds differently from row to row of a tile."""
    a, b = (8 * matrix(33, 64, torch.float32)).round().to(dtype), matrix(64, 40, dtype, seed=1).round()
    report = check_invariance(lambda a: fn(a, b), a, [1, 2, 7, 15, 16, 17, 32])
    assert report.invariant, report


@pytest.mark.parametrize("n", [48, 1296])
def test_chunks_of_k_are_added_left_to_right(n):
    """In fp32, where nothing is rounded on the way: one product over all of K, and the sum of its chunks'."""
    k, schedule = 4096 + 96, SCHEDULES[0]
    plan = plan_matmul(n, k, 4)
    assert plan.chunks == (4 if n == 48 else 2)
    a, b = matrix(5, k, torch.float32), matrix(k, n, torch.float32, seed=1)
    cuts = range(0, k, plan.chunk_k)
    parts = [matmul(a[:, at : at + plan.chunk_k], b[at : at + plan.chunk_k], schedule=schedule) for at in cuts]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert same_bits(matmul(a, b, schedule=schedule), total)


def test_chunks_side_by_side_have_the_bits_of_chunks_in_turn():
    in_turn = MatmulSchedule(16, 32, 64, 4, 3, swap=True, persistent=True)
    a, b = matrix(20, 4160, torch.float16), matrix(4160, 48, torch.float16, "columns", seed=1)
    bias = matrix(1, 48, torch.float16, seed=2)[0]
    split = matmul(a, b, bias, schedule=replace(in_turn, split=True))
    assert same_bits(split, matmul(a, b, bias, schedule=in_turn))
    assert_accurate(split, a, b, bias)


def test_the_number_of_sms_changes_no_bit(monkeypatch):
    a, b = matrix(70, 64, torch.float32), matrix(64, 144, torch.float32, seed=1)
    results = []
    for sms in (1, 20, 78, 132, 188):
        monkeypatch.setattr(mm, "sm_count", lambda device, sms=sms: sms)
        results.append(matmul(a, b, schedule=SCHEDULES[2]))
    assert all(same_bits(result, results[0]) for result in results)


def test_tiles_are_visited_once_each():
    """Every (row block, column block) belongs to exactly one program, whatever the grouping."""
    for m, n, group in [(1, 7, 8), (5, 3, 2), (8, 8, 8), (9, 4, 8), (17, 5, 4)]:
        seen = {tile(pid, m, n, group) for pid in range(m * n)}
        assert seen == {(i, j) for i in range(m) for j in range(n)}


def tile(pid, blocks_m, blocks_n, group):
    import triton
    import triton.language as tl

    @triton.jit
    def where_kernel(out_ptr, pid, M, N, GROUP_M: tl.constexpr):
        pid_m, pid_n = mm.tile_of(pid, M, N, 1, 1, GROUP_M)
        tl.store(out_ptr, pid_m)
        tl.store(out_ptr + 1, pid_n)

    out = torch.full((2,), -1, dtype=torch.int32, device=DEVICE)
    where_kernel[(1,)](out, pid, blocks_m, blocks_n, GROUP_M=group)
    return tuple(out.tolist())


@pytest.fixture
def hopper(monkeypatch):
    """The specialised kernel's module, its arithmetic as Python, run as program ``gl.at`` of ``gl.programs``."""
    module = pytest.importorskip("kernels.matmul_hopper")
    stand_in = SimpleNamespace(programs=1, at=0)
    stand_in.where = lambda condition, x, y: x if condition else y
    stand_in.num_programs, stand_in.program_id = lambda axis: stand_in.programs, lambda axis: stand_in.at
    monkeypatch.setattr(module, "gl", stand_in)
    for name in ("_shares", "_piece", "_pieces", "_jobs_and_steps", "_place", "block_of"):
        monkeypatch.setattr(module, name, getattr(module, name).fn)
    return module


def pieces_of(hopper, jobs, steps, relay):
    """For every program, what it does: (job, first step, last step), and the turn it has."""
    for program in range(hopper.gl.programs):
        hopper.gl.at = program
        turn, rounds, begin, end = hopper._shares(jobs, steps, relay)
        count = hopper._pieces(rounds, begin, end, steps, relay)
        yield turn, [hopper._piece(i, turn, rounds, begin, end, steps, relay) for i in range(count)]


def assert_dealt_out_once(hopper, jobs, steps, dealt):
    done = defaultdict(list)
    for turn, pieces in dealt:
        for i, (job, first, last) in enumerate(pieces):
            assert first < last
            assert last == steps or i == 0, "a job is begun first of all"
            assert first == 0 or (i == len(pieces) - 1 and turn < hopper.gl.programs - 1), "and finished last of all"
            done[job].append((first, last, turn))
    assert sorted(done) == list(range(jobs))
    for parts in map(sorted, done.values()):
        assert parts[0][0] == 0 and parts[-1][1] == steps and len(parts) <= 2
        assert all(b[0] == a[1] and a[2] == b[2] + 1 for a, b in pairwise(parts)), "handed to the one before"


@pytest.mark.parametrize("programs", [1, 2, 3, 7, 132])
@pytest.mark.parametrize("relay", [False, True])
def test_every_step_of_every_job_is_dealt_out_once(programs, relay, hopper):
    """Whoever waits does so last, for an earlier program."""
    hopper.gl.programs = programs
    for jobs, steps in product((programs, programs + 1, 2 * programs - 1, 3 * programs + 2), (1, 2, 5, 64)):
        dealt = list(pieces_of(hopper, jobs, steps, relay))
        assert_dealt_out_once(hopper, jobs, steps, dealt)
        most = max(sum(last - first for _, first, last in pieces) for _, pieces in dealt)
        even = -(-jobs // programs) * steps
        assert most == even if not relay else most <= min(even, -(-jobs * steps // programs) + 1)


def placed(hopper, m, n, schedule, sms):
    """What ``_place`` says of every tile of a specialised schedule, and how it is cut."""
    cut = schedule.cut(m, n, sms)
    split = {"CHUNKS": 2 if schedule.split else 1, "SPLIT": schedule.split}
    jobs, _ = hopper._jobs_and_steps(*cut[:2], 640, 320, **split, BLOCK_K=64)
    assert jobs == schedule.tiles(m, n, sms) * split["CHUNKS"]
    hopper.gl.programs = min(jobs, sms)
    sides = dict(zip(("RIGHT", "TAIL", "REST"), (*schedule.parts, 0, 0), strict=False))
    sides |= {"SWAP": schedule.swap, "LEFT": schedule.left}
    dealt = len(schedule.parts) > 1 and not schedule.split
    tiles = range(jobs // split["CHUNKS"])
    return [hopper._place(tile, m, n, *cut, dealt, **sides, GROUP_M=schedule.group_m) for tile in tiles], cut


def test_tiles_with_a_tail_are_wide_up_to_256_columns():
    for left, right, tail in product((64, 128), (64, 128, 256), (0, 16, 48)):
        if schedule := specialised_schedule(left, right, tail):
            assert schedule.wide == (tail > 0 and right + tail <= 256)
    assert specialised_schedule(256, 64, 0) and not specialised_schedule(256, 64, 16)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("right", "tail"), [(128, 0), (128, 32), (64, 48), (128, 96), (256, 16), (64, 8)])
def test_the_parts_of_all_tiles_cover_the_matrix(right, tail, swap, split, hopper):
    """Those of a tail too, which as many tiles of a line bear as it takes, and no two the same."""
    schedule = replace(specialised_schedule(64, right, tail, swap=swap), split=split, group_m=3)
    assert sum(schedule.parts) == right + tail
    sizes = (1, 9, right - 1, right, right + 1, right + tail, right + tail + 1, 777, 1000, 3 * right + tail)
    for size, other, sms in product(sizes, (64, 452), (1, 7, 132)):
        m, n = (size, other) if swap else (other, size)
        covered, tails = torch.zeros(m, n, dtype=torch.bool), defaultdict(set)
        tiles, cut = placed(hopper, m, n, schedule, sms)
        for left, starts, tailed in tiles:
            assert left >= 0 and min(starts) >= 0
            for at, (start, width) in enumerate(zip(starts, schedule.parts, strict=False)):
                rows, columns = (slice(start, start + width), slice(left, left + 64))[:: 1 if swap else -1]
                if at == 0 or split or tailed:
                    covered[rows, columns] = True
            if tailed and tail:
                tails[left].add(starts[1])
        assert covered.all(), (m, n, sms)
        if tail and not split:
            blocks = cut[0 if swap else 1]
            assert cut[2] == -(-max(size - blocks * right, 0) // tail) <= blocks
            assert all(len(starts) == cut[2] for starts in tails.values())


def test_a_cut_gives_the_busiest_program_the_least():
    """8192 columns are 64 tiles of 128: two row blocks fill 128 of 132 SMs, a third would double the time."""
    schedule = specialised_schedule(128, 128, 32, swap=True)
    cuts = {m: schedule.cut(m, 8192) for m in (1, 128, 256, 257, 288, 320, 321, 512, 640, 777)}
    assert {m: cut[1] for m, cut in cuts.items()} == dict.fromkeys(cuts, 64)
    assert [cut[::2] for cut in list(cuts.values())[:7]] == [(1, 0), (1, 0), (2, 0), (2, 1), (2, 1), (2, 2), (3, 0)]
    assert cuts[512][::2] == (4, 0) and cuts[640][::2] == (4, 4)
    assert cuts[777][::2] == (6, 1)  # three rounds; five blocks of 160 are as many, of longer ones
    assert schedule.cut(777, 8192, sms=64)[::2] == (5, 5)  # as much to multiply as with six and a tail, less to load
    assert schedule.cut(320, 8192, sms=1)[::2] == (2, 2)
    assert replace(schedule, split=True).cut(777, 8192) == (5, 64, 5)


@pytest.mark.parametrize("n", [4096, 6144, 8192, 10240, 28672, 57344])
@pytest.mark.parametrize("right", [128, 256])
def test_no_program_meets_all_the_tails(right, n, hopper):
    """At most one in as many rounds as a column has tiles, and one more because a column may lie in two rounds."""
    tiles, (blocks, _, tails) = placed(hopper, 777, n, specialised_schedule(64, right, 16, swap=True), 132)
    assert tails <= 1  # none where a fourth block of 256 rows costs no further round
    rounds = -(-len(tiles) // 132)
    most = max(sum(tailed for *_, tailed in tiles[program::132]) for program in range(132))
    assert most <= -(-rounds // blocks) + 1


def test_default_schedules_respect_the_plan_and_the_operands():
    for m in (1, 16, 17, 64, 65, 128, 129, 1000, 8192):
        for n in (1, 1000, 28672):
            for itemsize, precision in ((2, "ieee"), (4, "ieee"), (4, "tf32"), (4, "tf32x3")):
                plan = plan_matmul(n, 4096, itemsize, precision)
                for tma, specialised in ((False, False), (True, False), (True, True)):
                    schedule = choose_schedule(m, n, plan, itemsize, tma, 132, specialised)
                    assert tma or not (schedule.persistent or schedule.split)
                    assert specialised or not schedule.specialised
                    assert plan.block_k in (None, schedule.block_k)
                    assert schedule.fits(plan)


@pytest.mark.parametrize(("n", "block_n"), [(4096, 64), (8192, 64), (10240, 128), (28672, 128), (57344, 64)])
def test_thin_tiles_give_the_busiest_program_the_fewest_columns(n, block_n):
    for m in (1, 16, 17, 32):
        for specialised in (False, True):
            schedule = choose_schedule(m, n, plan_matmul(n, 4096, 2), 2, True, 132, specialised)
            assert schedule.swap and schedule.block_n == block_n
            assert schedule.specialised == (specialised and block_n == 128)


@pytest.mark.parametrize(
    ("m", "shape", "block_m"),
    [(17, (4096, 4096), 16), (32, (2560, 8192), 16), (17, (8192, 4096), 32), (17, (28672, 4096), 32),
     (64, (1280, 8192), 32)],
)  # fmt: skip
def test_thin_tiles_are_low_where_all_their_jobs_run_at_once(m, shape, block_m):
    """Two row blocks of 64 tiles of columns are 128 programs for 132 SMs; of 128 tiles they would be too many."""
    schedule = choose_schedule(m, shape[0], plan_matmul(*shape, 2), 2, True, 132, True)
    assert schedule.block_m == block_m
    assert choose_schedule(m, shape[0], plan_matmul(*shape, 2), 2, True, 66, True).block_m >= block_m


A, B = torch.zeros(3, 4), torch.zeros(4, 5)
TAILED = specialised_schedule(128, 64, 16, swap=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"a": A.int(), "b": B}, TypeError, r"a\.dtype=torch\.int32"),
        ({"a": A, "b": B.cfloat()}, TypeError, r"b\.dtype=torch\.complex64"),
        ({"a": A, "b": B.half()}, TypeError, r"b\.dtype=torch\.float16"),
        ({"a": A, "b": B.to("meta")}, ValueError, r"b\.device=meta"),
        ({"a": A[0, 0], "b": B}, ValueError, r"a\.shape=\(\)"),
        ({"a": A[0], "b": B.t()}, ValueError, r"a\.shape=\(1, 4\) has K=4, b\.shape=\(5, 4\) has K=5"),
        (
            {"a": A.expand(2, 3, 4), "b": B.expand(3, 4, 5)},
            ValueError,
            r"\(2, 3, 4\) and .*\(3, 4, 5\) do not broadcast",
        ),
        ({"a": A, "b": B, "out_dtype": torch.int8}, TypeError, r"out_dtype=torch\.int8"),
        ({"a": A, "b": B, "out": torch.zeros(3, 4)}, ValueError, r"out\.shape=\(3, 4\)"),
        ({"a": A, "b": B, "out": torch.zeros(3, 5).half()}, ValueError, r"out\.dtype=torch\.float16"),
        ({"a": A, "b": B, "out": torch.zeros(5, 3).t()}, ValueError, r"out\.stride\(\)=\(1, 3\)"),
        ({"a": A, "b": B, "out": torch.zeros(1, 5).expand(3, 5)}, ValueError, r"out\.stride\(\)=\(0, 1\)"),
        ({"a": A, "b": B[:, :4], "out": A}, ValueError, "out shares memory with a"),
        ({"a": A[None], "b": B, "out": torch.zeros(1, 3, 5)}, ValueError, "out is for two matrices"),
        ({"a": A, "b": B.t()}, ValueError, r"a\.shape=\(3, 4\) has K=4, b\.shape=\(5, 4\) has K=5"),
        ({"a": A, "b": B, "bias": torch.zeros(4)}, ValueError, r"bias\.shape=\(4,\)"),
        ({"a": A, "b": B, "precision": "high"}, ValueError, "precision='high'"),
        ({"a": A.half(), "b": B.half(), "precision": "tf32"}, ValueError, "precision='tf32'"),
        (
            {"a": A, "b": B, "precision": "tf32x3", "schedule": MatmulSchedule(16, 16, 32, 4, 3)},
            ValueError,
            "block_k=32",
        ),
        ({"a": A, "b": torch.zeros(4, 3), "schedule": SCHEDULES[2]}, ValueError, "TMA descriptors"),
        (
            {"a": A, "b": B, "schedule": replace(SCHEDULES[1], tail_m=16)},
            ValueError,
            "tail_m=16.* must be specialised",
        ),
        ({"a": A, "b": B, "schedule": replace(SCHEDULES[1], tail_n=16)}, ValueError, "tail on its left side"),
        ({"a": A, "b": B, "schedule": replace(SCHEDULES[1], wide=True)}, ValueError, "wide: it must have a tail"),
        ({"a": A, "b": B, "schedule": replace(SCHEDULES[1], early=True)}, ValueError, "early=True.* is early, so it"),
        ({"a": A, "b": B, "schedule": replace(SCHEDULES[1], ahead=8)}, ValueError, "ahead=8.* must be persistent"),
        ({"a": A, "b": B, "schedule": replace(SCHEDULES[2], ahead=-8)}, ValueError, "fetches ahead=-8"),
        ({"a": A, "b": B, "schedule": replace(TAILED, ahead=8)}, ValueError, "ahead=8.* not specialised"),
        (
            {"a": A, "b": B, "schedule": MatmulSchedule(64, 64, 64, 4, 3, specialised=True, tail_n=56)},
            ValueError,
            r"\(64, 32, 16, 8\): three are the most",
        ),
        *(
            ({"a": A, "b": B, "schedule": replace(TAILED, **wrong)}, ValueError, why)
            for wrong, why in (
                ({"tail_m": 4}, "no fewer than 8"),
                ({"tail_m": 160}, r"parts \(64, 128, 32\): the first must be as wide as any"),
                ({"block_k": 128}, "block_k must be 64"),
                ({"num_warps": 4}, "the left side 16 rows a warp"),
                ({"block_m": 256}, "no more than 256 columns"),
            )
        ),
        (
            {"a": torch.zeros(3, 5120), "b": torch.zeros(5120, 8), "schedule": MatmulSchedule(16, 16, 512, 4, 2)},
            ValueError,
            "block_k=512.* steps over the ends of the chunks",
        ),
        ({"a": A[None], "b": B[None], "schedule": SCHEDULES[0]}, ValueError, "schedule is for two matrices"),
        ({"a": A, "b": B, "bias": (o := torch.zeros(3, 5))[0], "out": o}, ValueError, "out shares memory with bias"),
        ({"a": A.clone().requires_grad_(), "b": B}, ValueError, r"a\.requires_grad=True"),
        ({"a": A, "b": B.clone().requires_grad_()}, ValueError, r"b\.requires_grad=True"),
    ],
)
def test_bad_arguments_are_named_with_their_value(arguments, error, message):
    with pytest.raises(error, match=message):
        matmul(**arguments)


# ------------------------------------------------------------------------------------- as torch.matmul and addmm

RANKS = [(4,), (3, 4), (2, 3, 4), (5, 1, 3, 4)], [(4,), (4, 6), (2, 4, 6), (1, 2, 4, 6)]


@pytest.mark.parametrize("a_shape", RANKS[0])
@pytest.mark.parametrize("b_shape", RANKS[1])
def test_all_pairs_of_ranks_are_torchs(a_shape, b_shape):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(DEVICE) for shape in (a_shape, b_shape))
    want = torch.matmul(a.double(), b.double())
    got = matmul(a, b)
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= torch.finfo(a.dtype).eps * torch.matmul(a.abs(), b.abs()).norm()


@pytest.mark.parametrize(
    "shapes", [((0, 3, 4), (4, 6)), ((2, 0, 4), (2, 4, 6)), ((2, 3, 0), (2, 0, 6)), ((0,), (0,))]
)
def test_empty_batches_are_torchs(shapes):
    a, b = (torch.zeros(shape, device=DEVICE) for shape in shapes)
    want = torch.matmul(a, b)
    assert torch.equal(matmul(a, b), want)


@pytest.mark.parametrize("k", [64, 4160])
def test_the_same_rows_have_the_same_bits_through_every_rank(k):
    a, b = matrix(6, k, torch.float32), matrix(k, 10, torch.float32, seed=1)
    schedule = choose_schedule(3, 10, plan_matmul(10, k, 4), 4, False, 1)
    want = matmul(a, b, schedule=schedule)
    assert same_bits(matmul(a.view(2, 3, k), b).view(6, 10), want)
    assert same_bits(matmul(a.view(2, 3, k), b.expand(2, k, 10)).view(6, 10), want)
    assert same_bits(matmul(a.view(2, 1, 3, k), b.expand(1, 2, k, 10))[:, 0].reshape(6, 10), want)


def test_one_row_with_a_bias_takes_every_schedule():
    a, b, bias = (
        matrix(1, 64, torch.float16),
        matrix(64, 48, torch.float16, "columns", seed=1),
        matrix(1, 48, torch.float16)[0],
    )
    for schedule in SCHEDULES:
        assert_accurate(matmul(a, b, bias, schedule=schedule), a, b, bias)


def test_one_column_and_one_row():
    a, b = matrix(5, 33, torch.float16), matrix(33, 1, torch.float16, seed=1)
    assert_accurate(matmul(a, b), a, b)
    assert_accurate(matmul(a[:1], b), a[:1], b)


@pytest.mark.parametrize("shape", [(7, 20), (1, 20), (20,), (7, 1), ()])
@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (0.5, -2), (3, 0), (0, 1)])
def test_addmm_takes_scales_and_broadcasts(shape, alpha, beta):
    generator = torch.Generator().manual_seed(3)
    a, b, addend = (
        matrix(7, 33, torch.float32),
        matrix(33, 20, torch.float32),
        torch.randn(shape, generator=generator),
    )
    addend = addend.to(DEVICE)
    want = torch.addmm(addend.double(), a.double(), b.double(), alpha=alpha, beta=beta)
    magnitude = torch.addmm(addend.abs(), a.abs(), b.abs(), alpha=abs(alpha), beta=abs(beta))
    got = addmm(addend, a, b, alpha=alpha, beta=beta)
    assert (got.double() - want).norm() <= torch.finfo(a.dtype).eps * magnitude.norm()


def test_with_alpha_zero_the_product_is_not_read():
    a, b, addend = matrix(3, 4, torch.float32), matrix(4, 5, torch.float32), matrix(3, 5, torch.float32)
    assert same_bits(addmm(addend, a * float("nan"), b, alpha=0, beta=0.5), addend * 0.5)


def test_with_beta_zero_the_addend_is_not_read():
    a, b = matrix(3, 4, torch.float32), matrix(4, 5, torch.float32)
    nan = torch.full((3, 5), float("nan"), device=DEVICE)
    assert same_bits(addmm(nan, a, b, beta=0), matmul(a, b))


def test_tiles_that_overlap_add_the_addend_once():
    """The last tile moves back inside the matrix, over rows that the one before has computed."""
    a, b, addend = matrix(70, 40, torch.float32), matrix(40, 70, torch.float32), matrix(70, 70, torch.float32)
    want = torch.addmm(addend.double(), a.double(), b.double(), alpha=2, beta=3)
    magnitude = torch.addmm(addend.abs(), a.abs(), b.abs(), alpha=2, beta=3)
    got = addmm(addend, a, b, alpha=2, beta=3)
    assert (got.double() - want).norm() <= torch.finfo(a.dtype).eps * magnitude.norm()
    with pytest.raises(ValueError, match="out shares memory with addend"):
        addmm(addend, a, b, out=addend)


def test_weights_that_can_be_trained_are_taken_where_no_gradient_is_wanted():
    weight = matrix(4, 5, torch.float32).requires_grad_()
    with torch.no_grad():
        assert same_bits(
            matmul(matrix(3, 4, torch.float32), weight), matmul(matrix(3, 4, torch.float32), weight.data)
        )


def test_addmm_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"addend\.shape=\(4,\) does not broadcast to \(3, 5\)"):
        addmm(torch.zeros(4), A, B)
    with pytest.raises(ValueError, match=r"got \(3, 4\) and \(5, 4\)"):
        addmm(torch.zeros(5), A, B.t())


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_the_output_is_rounded_once_to_the_dtype_asked_for(out_dtype):
    a, b = matrix(9, 40, torch.float16), matrix(40, 16, torch.float16, seed=1)
    wide = matmul(a, b, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert same_bits(matmul(a, b, out_dtype=out_dtype), wide.to(out_dtype))


def test_out_is_written_and_returned():
    a, b = matrix(9, 40, torch.float32), matrix(40, 16, torch.float32, seed=1)
    wide = torch.full((9, 20), float("nan"), device=DEVICE)
    assert matmul(a, b, out=wide[:, :16]).data_ptr() == wide.data_ptr()
    assert same_bits(wide[:, :16], matmul(a, b))
    assert wide[:, 16:].isnan().all()


def test_the_launcher_takes_no_hint_about_the_batch():
    assert set(inspect.signature(plan_matmul).parameters) == {"n", "k", "itemsize", "precision"}
