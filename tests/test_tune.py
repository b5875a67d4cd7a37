"""The tuner's bookkeeping; that its candidates are bit-equal is checked on the GPU, before each is timed."""

import json
from dataclasses import replace
from itertools import product
from math import log
from statistics import correlation, fmean
from types import SimpleNamespace

import pytest
import torch

from kernels import tuned
from kernels.matmul import (
    SHARED_BYTES,
    THIN,
    MatmulSchedule,
    check_schedule,
    choose_schedule,
    estimate_us,
    specialised_schedule,
    thin_schedule,
)
from kernels.plan import plan_matmul
from lab.tune import (
    FEW,
    LAUNCHED,
    MODELS,
    TENSOR_PARALLEL,
    TOKENS,
    VARIANTS,
    as_text,
    candidates,
    choose_variants,
    compiled,
    compromises_at,
    draw_table,
    fastest_few,
    fields_of,
    launches_of,
    layers,
    main,
    medians,
    read_runs,
    rows_of,
    runs_of,
    shard,
    specialised_schedules,
    thin_schedules,
    time_model,
    time_schedules,
    write_runs,
)

FAST, FAIR, SLOW = (MatmulSchedule(16 << i, 64, 64, 4, 3) for i in range(3))


def test_a_shard_cuts_the_side_that_its_layer_cuts():
    assert shard("llama-3-8b", "qkv", 4) == (1536, 4096)
    assert shard("llama-3-8b", "down", 8) == (4096, 1792)
    assert shard("llama-3-70b", "o", 8) == (8192, 1024)


def test_few_schedules_are_kept_where_they_cost_least():
    times = {1: {FAST: 1.0, FAIR: 1.1, SLOW: 2.0}, 2: {FAIR: 1.0, SLOW: 1.01}, 3: {SLOW: 1.0}}
    assert fastest_few(times, 3) == {1: FAST, 2: FAIR, 3: SLOW}
    assert fastest_few(times, 2) == {1: FAST, 2: SLOW, 3: SLOW}
    assert fastest_few(times, 1) == {1: SLOW, 2: SLOW, 3: SLOW}


@pytest.fixture
def bench(monkeypatch):
    """``time_schedules`` on a CPU: schedules in ``flipped`` have one bit wrong, and ``timed`` is what ran."""
    flipped, timed = [], []

    def product_of(a, b, schedule):
        c = a @ b
        if schedule in flipped:
            c.view(torch.int16)[1, 2] ^= 1
        return c

    def time(rings, preset):
        timed.append(list(rings))
        return {name: SimpleNamespace(median_ms=1.0 + (name == SLOW)) for name in rings}

    randn = torch.randn
    monkeypatch.setattr("lab.tune.torch.randn", lambda *shape, device, dtype: randn(*shape, dtype=dtype))
    monkeypatch.setattr("lab.tune.matmul", product_of)
    monkeypatch.setattr("lab.tune.time_graphs", time)
    weights = [randn(8, 16, dtype=torch.bfloat16) for _ in range(2)]
    return SimpleNamespace(flipped=flipped, timed=timed, weights=weights)


def test_a_candidate_with_other_bits_stops_the_search_before_it_is_timed(bench):
    """One bit in one number is enough; without it the same call goes through."""
    assert time_schedules(4, bench.weights, [FAST, SLOW]) == {FAST: 1.0, SLOW: 2.0}
    bench.timed.clear()
    bench.flipped.append(SLOW)
    with pytest.raises(RuntimeError, match=r"is no schedule: 1 of 4 rows differ"):
        time_schedules(4, bench.weights, [FAST, SLOW])
    assert not bench.timed


@pytest.mark.parametrize("count", [2, 5, 11])
def test_the_slow_reference_takes_one_turn_in_four(bench, count):
    tried = [replace(FAST, num_stages=2 + i) for i in range(count)]
    times = time_schedules(4, bench.weights, tried)
    assert list(times) == tried
    for company in bench.timed:
        slow = [name for name in company if str(name).startswith("slow")]
        assert len(slow) == (len(company) - len(slow)) // 3
    assert [len(company) for company in bench.timed] == [count + 1 + (count + 1) // 3, min(count, 3) + 2]


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("shape", [(768, 4096), (6144, 4096)])
def test_every_candidate_fits_its_plan(m, shape):
    plan = plan_matmul(*shape, 2)
    tried = candidates(m, shape[0], plan, wgmma=True)
    assert len(tried) == len(set(tried)) > 3
    assert all(schedule.fits(plan) for schedule in tried)
    assert not any(schedule.specialised for schedule in candidates(m, shape[0], plan, wgmma=False))


def test_a_compromise_is_tried_where_its_chunks_are_the_plans_and_it_is_not_hopeless():
    plan = plan_matmul(6144, 4096, 2)
    fair, slow = specialised_schedule(128, 128), specialised_schedule(64, 64, swap=True)
    few = {(plan.chunks, fair), (plan.chunks, slow), (plan.chunks + 1, specialised_schedule(128, 256))}
    assert compromises_at(8192, 6144, plan, few) == [fair]
    assert compromises_at(64, 6144, plan, few) == [slow]


def test_every_thin_schedule_fits_its_plan_and_shared_memory():
    for m, plan in product((1, 8, 16, 17, 64), (plan_matmul(768, 4096, 2), plan_matmul(6144, 4096, 2))):
        found = list(thin_schedules(m, plan))
        assert len(found) == len(set(found)) >= 8
        assert min(s.block_m for s in found) <= max(8, m)
        for s in found:
            check_schedule(s, plan)
            assert s.swap and s.fits(plan) and s.num_stages >= 3
            assert 2 * (s.block_m + s.block_n) * s.block_k * s.num_stages <= SHARED_BYTES - 1024


def test_every_specialised_schedule_fits_its_plan_and_shared_memory():
    for shape in ((768, 4096), (6144, 4096)):
        plan = plan_matmul(*shape, 2)
        found = list(specialised_schedules(plan))
        assert len(found) == len(set(found)) > 50
        for s in found:
            assert s.left % 64 == 0 and s.num_stages >= 3 and s.fits(plan)
            check_schedule(s, plan)  # refuses what is none
            assert s.ring_bytes + 2 * s.left * max(s.parts) <= SHARED_BYTES - 1024
            assert not (s.tail_n if s.swap else s.tail_m)
    assert any(s.relay and not s.split for s in found) and not any(s.split for s in found)


def test_the_estimate_knows_when_a_round_does_not_come_out_even():
    plan = plan_matmul(10240, 8192, 2)
    whole = specialised_schedule(128, 256)
    fair = specialised_schedule(128, 256, relay=True)
    assert estimate_us(512, 10240, plan, fair) < 0.8 * estimate_us(512, 10240, plan, whole)  # 160 tiles, 132 SMs
    assert estimate_us(8192, 10240, plan, whole) > 10 * estimate_us(512, 10240, plan, fair)


def test_the_estimate_knows_what_a_tail_costs_that_one_tile_has():
    plan = plan_matmul(8192, 8192, 2)
    dealt, padded = (specialised_schedule(64, 256, tail, swap=True) for tail in (16, 0))
    assert estimate_us(768, 8192, plan, dealt) < 0.99 * estimate_us(769, 8192, plan, dealt)
    assert estimate_us(769, 8192, plan, dealt) < 0.99 * estimate_us(769, 8192, plan, padded)


@pytest.mark.parametrize(
    ("m", "shape", "schedule", "measured_us"),
    [
        (1024, (768, 4096), specialised_schedule(64, 64, 32), 13.7),
        (777, (7168, 8192), specialised_schedule(128, 128, swap=True), 141.3),
        (777, (4096, 4096), specialised_schedule(128, 128, 72, swap=True), 37.3),
        (777, (8192, 8192), specialised_schedule(128, 128, 72, swap=True), 137.0),
        (512, (6144, 4096), specialised_schedule(128, 64, 32), 39.6),
        (512, (10240, 8192), specialised_schedule(128, 128, 32), 115.8),
        (777, (4096, 14336), specialised_schedule(128, 128, 80, swap=True), 134.5),
        (777, (4096, 14336), replace(specialised_schedule(128, 128, 80, swap=True), wide=False), 148.1),
        (777, (4096, 14336), specialised_schedule(64, 128, 80, swap=True), 139.2),
        (2048, (4096, 4096), specialised_schedule(128, 128, 128), 89.2),
    ],
)
def test_the_estimate_is_near_what_an_h200_measured(m, shape, schedule, measured_us):
    """Within an eighth: a chip under load slows its clock down, by more the longer a launch takes."""
    assert 0.88 < estimate_us(m, shape[0], plan_matmul(*shape, 2), schedule) / measured_us < 1.125


@pytest.fixture(scope="module")
def many_rows():
    """(n, k, m, plan) and the times of the H200's newest run, for more rows than ``THIN``."""
    (_, times) = read_runs(runs_of("NVIDIA H200"))[-1]
    found = [(n, k, m, plan_matmul(n, k, 2), tried) for (n, k, m), tried in times.items() if m > THIN]
    assert len(found) > 300
    return found


@pytest.mark.parametrize(("within", "least", "most"), [(99.0, 0.70, 0.76), (1.15, 0.45, 0.51)])
def test_the_estimate_tells_good_tiles_from_bad_ones_as_well_as_it_says(within, least, most, many_rows):
    """Its correlation with the times of a product's tiles; among near equals it is the lesser."""
    estimates, measured = [], []
    for n, _, m, plan, tried in many_rows:
        tiles = {s: time for s, time in tried.items() if s.specialised and not (s.relay or s.early)}
        near = [s for s, time in tiles.items() if time < within * min(tiles.values())]
        estimated = [estimate_us(m, n, plan, s) for s in near]
        for all_of, found in ((estimates, estimated), (measured, [tiles[s] for s in near])):
            mean = fmean(map(log, found))
            all_of += [log(one) - mean for one in found]
    assert least < correlation(estimates, measured) < most


def test_default_tiles_are_near_the_fastest_on_an_h200(many_rows):
    """In the mean, launched as they are by default, or late where only that was timed."""
    losses = []
    for n, _, m, plan, tried in many_rows:
        schedule = choose_schedule(m, n, plan, 2, True, 132, True)
        losses.append(log(tried.get(schedule, tried[schedule.compiled]) / min(tried.values())))
    assert 0.020 < fmean(losses) < 0.025


def test_the_last_layer_is_tuned_for_few_rows():
    assert layers("llama-3-8b", 8) == {(768, 4096), (4096, 512), (3584, 4096), (4096, 1792), (16032, 4096)}
    assert rows_of(16032, TOKENS) == [m for m in TOKENS if m <= 512]
    assert rows_of(768, TOKENS) == list(TOKENS)


def test_tuning_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("lab.tune.current_device", lambda: type("CPU", (), {"is_gpu": False}))
    with pytest.raises(SystemExit):
        main([])
    assert "torch sees none here" in capsys.readouterr().err


def test_tuning_some_rows_keeps_the_others(tmp_path, monkeypatch):
    """Rows that a table has stay, a shape without rows to tune leaves no empty entry behind, and the run is kept."""
    chip = SimpleNamespace(is_gpu=True, name="this one", torch="2", triton="3")
    kept = {"block_m": 16}
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    (tmp_path / "this-one.json").write_text(as_text({"gpu": "this one"}, {(6144, 4096): {64: kept, 2048: kept}}))
    schedule = choose_schedule(1024, 6144, plan_matmul(6144, 4096, 2), 2, True, 132, True)
    for name, stand_in in {
        "current_device": lambda: chip,
        "commit": lambda: "abc",
        "runs_of": lambda gpu: tmp_path / f"{gpu}.runs",
        "has_wgmma": lambda device: True,
        "compile_all": lambda shapes, tokens: None,
        "time_model": lambda shapes, tokens: {
            (*shape, m): {(1, schedule): 0.9} for shape in shapes for m in rows_of(shape[0], tokens)
        },
        "fastest_few": lambda times, most: {point: next(iter(found)) for point, found in times.items()},
    }.items():
        monkeypatch.setattr(f"lab.tune.{name}", stand_in)
    for already in range(2):
        assert len(read_runs(tmp_path / "this one.runs")) == already
        assert main(["--model", "llama-3-8b", "--tp", "1", "--m", "1024"]) == 0
    tuned._table.cache_clear()
    assert tuned.find("this one", 6144, 4096, 64) == tuned.find("this one", 6144, 4096, 2048) == kept
    assert tuned.find("this one", 6144, 4096, 1024)["block_m"] == schedule.block_m
    assert tuned.find("this one", 128256, 4096, 64) is None
    tuned._table.cache_clear()
    (_, times), _ = read_runs(tmp_path / "this one.runs")
    assert times[6144, 4096, 1024] == {schedule: 0.9}


ORIGIN = {"gpu": "this one", "torch": "2", "triton": "3", "commit": "abc", "measured_at": "now"}


def test_runs_read_back_as_they_were_written(tmp_path):
    runs = [(ORIGIN, {(64, 32, 16): {FAST: 0.5, SLOW: 1.25}, (8, 32, 16): {FAST: 1 / 3}}), (ORIGIN, {})]
    write_runs(tmp_path / "tune.json", runs)
    (_, first), second = read_runs(tmp_path / "tune.json")
    assert first == {(64, 32, 16): {FAST: 0.5, SLOW: 1.25}, (8, 32, 16): {FAST: 0.33333}}
    assert second == (ORIGIN, {})
    assert read_runs(tmp_path / "none.json") == []


def test_runs_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "tune.json"
    points = json.dumps(ORIGIN)[:-1] + ', "points": [[1, 2, 3, []]]}'
    for text in ("{", "[]", '{"schedules": [], "runs": [{}]}', f'{{"schedules": [], "runs": [{points}]}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tune\.json holds no runs"):
            read_runs(path)
    write_runs(path, [(ORIGIN, {}), (ORIGIN | {"gpu": "another"}, {})])
    with pytest.raises(ValueError, match="runs of several GPUs"):
        read_runs(path)


def test_a_batch_counts_for_the_row_that_serves_it_in_the_median_of_all_runs():
    first = {(64, 32, 9): {FAST: 1.0}, (64, 32, 16): {FAST: 40.0, SLOW: 3.0}, (64, 32, 17): {FAST: 9.0}}
    second = {(64, 32, 16): {FAST: 2.0}}
    found = medians([(ORIGIN, first), (ORIGIN, second)], (8, 16))
    assert found.keys() == {(64, 32, 16)}
    assert found[64, 32, 16] == pytest.approx({(1, FAST): 2.0, (1, SLOW): 3.0})


def test_a_kernel_is_known_by_all_ways_to_launch_it():
    """And of a kernel that is kept, the way that is fastest at the point."""
    early = replace(specialised_schedule(64, 64), early=True)
    point, other = (64, 32, 16), (64, 32, 8)
    run = {point: {early: 1.0, early.compiled: 1.1}, other: {early: 1.0, early.compiled: 0.9}}
    times = medians([(ORIGIN, run)], (8, 16), spread=0.02)
    assert times[point][1, early] == pytest.approx(1 + 0.02 / 2**0.5)
    assert choose_variants(times, 1) == {point: (1, early), other: (1, early.compiled)}


def test_an_early_launch_counts_only_where_it_is_short():
    early = replace(specialised_schedule(128, 128), early=True)
    short, long = (4096, 512, 128), (28672, 8192, 4096)
    run = {point: {early: 1.0, early.compiled: 1.1} for point in (short, long)}
    times = medians([(ORIGIN, run)], TOKENS)
    assert set(times[short]) == {(1, early), (1, early.compiled)}
    assert set(times[long]) == {(1, early.compiled)}


def test_all_ways_to_launch_a_schedule_are_schedules():
    for schedule in (thin_schedule(16, 64, 128), specialised_schedule(64, 64)):
        ways = launches_of(schedule)
        assert ways[0] == schedule and {way.compiled for way in ways} == {schedule}
        assert {way.ahead > 0 for way in ways if way.early} == {False, not schedule.specialised}
        for way in ways:
            check_schedule(way, plan_matmul(4096, 4096, 2))


def test_the_best_few_of_a_short_point_are_launched_in_all_ways(monkeypatch):
    """Side by side in one call; and of those that are not among them, or long, no launch is early."""
    calls = []

    def time(m, weights, schedules):
        calls.append(schedules)
        return {s: 1.0 + sum(map(ord, repr(s.compiled))) % 97 / 100 - s.early / 1000 for s in schedules}

    monkeypatch.setattr("lab.tune.has_wgmma", lambda device: True)
    monkeypatch.setattr("lab.tune.cold_weights", lambda n, k: [])
    monkeypatch.setattr("lab.tune.time_schedules", time)
    times = time_model({(4096, 512), (28672, 8192)}, [8, 256, 8192])
    for m in (8, 256):
        found = times[4096, 512, m]
        early = {compiled(variant) for variant in found if variant[1].early}
        late = sorted((variant for variant in found if not variant[1].early), key=found.get)
        assert 1 <= len(early) <= LAUNCHED and late[0] in early
        assert any({s for _, s in early} == {s.compiled for s in schedules} for schedules in calls)
    assert not any(schedule.early for _, schedule in times[28672, 8192, 8192])


def test_one_lucky_time_does_not_beat_many():
    often = {(64, 32, 16): {FAST: 1.0}}
    once = {(64, 32, 16): {FAST: 1.0, SLOW: 0.99}}
    times = medians([(ORIGIN, once), *[(ORIGIN, often)] * 8], (8, 16), spread=0.03)[64, 32, 16]
    assert times[1, SLOW] > times[1, FAST]


def test_rows_that_are_not_asked_for_lend_their_times_to_no_other():
    shape = (6144, 4096)
    run = {(*shape, 777): {FAST: 0.5, SLOW: 1.0}, (*shape, 1024): {FAST: 1.0, SLOW: 0.9}}
    assert draw_table([(ORIGIN, run)], [("llama-3-8b", 1)], [1024]) == {shape: {1024: fields_of(SLOW)}}


def test_the_table_that_ships_is_what_the_recorded_runs_choose():
    runs = read_runs(runs_of("NVIDIA H200"))
    table = json.loads(tuned.path_of("NVIDIA H200").read_text())
    shipped = {
        (shape["n"], shape["k"]): {int(m): table["schedules"][at] for m, at in shape["rows"].items()}
        for shape in table["shapes"]
    }
    assert draw_table(runs, list(product(MODELS, TENSOR_PARALLEL)), TOKENS) == shipped
    assert table["commit"].split(", ") == list(dict.fromkeys(origin["commit"] for origin, _ in runs))


def test_a_table_is_drawn_from_runs_without_a_gpu(tmp_path, monkeypatch, capsys):
    """On any machine, and the same table again from the same runs."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    wide = specialised_schedule(128, 128)
    times = {(*shape, 1024): {wide: 1.0} for shape in layers("llama-3-8b", 1) if shape[0] != 128256}
    write_runs(tmp_path / "tune.json", [(ORIGIN, times), (ORIGIN | {"commit": "def"}, times)])
    call = ["--runs", str(tmp_path / "tune.json"), "--model", "llama-3-8b", "--tp", "1"]
    assert main(call) == 0
    text = (tmp_path / "this-one.json").read_text()
    assert main(call) == 0
    assert (tmp_path / "this-one.json").read_text() == text
    assert json.loads(text)["commit"] == "abc, def"
    assert tuned.find("this one", 6144, 4096, 1024) == fields_of(wide)
    tuned._table.cache_clear()
    with pytest.raises(SystemExit):
        main(["--runs", str(tmp_path / "none.json")])
    assert "none.json does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"schedules": [], "shapes": [{"n": 1, "k": 1, "rows": {"1": 0}}]}']
)
def test_a_damaged_table_is_named(tmp_path, monkeypatch, text):
    (tmp_path / "this-one.json").write_text(text)
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned._table.cache_clear()
    with pytest.raises(ValueError, match=r"this-one\.json is no table of schedules"):
        tuned.find("this one", 1, 1, 1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"registers": True}, "registers"), ({"tail_n": 16, "block_k": 128, "specialised": True}, "block_k must be 64")],
)
def test_a_table_of_another_version_is_named(tmp_path, monkeypatch, fields, said):
    schedule = fields_of(MatmulSchedule(64, 64, 64, 4, 3)) | fields
    (tmp_path / "this-one.json").write_text(as_text({"gpu": "this one"}, {(64, 32): {16: schedule}}))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned._table.cache_clear()
    choose_schedule.cache_clear()
    with pytest.raises(ValueError, match=rf"this-one\.json is a table of another version .*{said}.*: tune again"):
        choose_schedule(1, 64, plan_matmul(64, 32, 2), 2, True, 132, True, "this one")
    tuned._table.cache_clear()


TABLES = sorted(tuned.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_shipped_table_names_its_origin_and_holds_valid_schedules(path):
    table = json.loads(path.read_text())
    assert tuned.path_of(table["gpu"]) == path
    assert {"torch", "triton", "commit", "measured_at"} <= set(table)
    for shape in table["shapes"]:
        plan, rows = plan_matmul(shape["n"], shape["k"], 2), [int(m) for m in shape["rows"]]
        assert rows == sorted(set(rows))
        for index in shape["rows"].values():
            schedule = MatmulSchedule(**table["schedules"][index])
            assert schedule.fits(plan)
            check_schedule(schedule, plan)  # refuses what is none


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_model_needs_at_most_a_dozen_variants(path):
    """Of the layers that were tuned, for one row up to the longest batch."""
    table = json.loads(path.read_text())
    rows, schedules = {(shape["n"], shape["k"]): shape["rows"] for shape in table["shapes"]}, table["schedules"]
    for model in MODELS:
        for tp in TENSOR_PARALLEL:
            used = {
                compiled((plan_matmul(*shape, 2).chunks, MatmulSchedule(**schedules[index])))
                for shape in layers(model, tp) & set(rows)
                for index in rows[shape].values()
            }
            assert len(used) <= VARIANTS == 12
            assert all(min(map(int, rows[shape])) <= 8 for shape in layers(model, tp) & set(rows))


@pytest.mark.parametrize("tp", TENSOR_PARALLEL)
def test_few_rows_and_many_are_searched_apart(tp):
    """However much slower many rows are: few ones keep variants of their own, and all together are a dozen."""
    few = {(64, 64, m): {(1, MatmulSchedule(16, 64, k, 4, 3)): 1.0} for m, k in zip((8, 16), (64, 128), strict=True)}
    wide = [(1, MatmulSchedule(64, 64, 64, 4, stages)) for stages in range(2, 22)]
    many = {(64, 64, 64 + at): {v: 2.0 + (v != one) for v in wide} for at, one in enumerate(wide)}
    chosen = choose_variants(few | many, tp)
    assert all(chosen[point] in found for point, found in few.items())
    assert chosen.keys() == (few | many).keys()
    assert len({chosen[point] for point in many}) == VARIANTS - FEW[tp]
    assert choose_variants(few, tp).keys() == few.keys()


def test_a_table_reads_back_as_it_was_written(tmp_path, monkeypatch):
    first, second = {"block_m": 16}, {"block_m": 128, "relay": True}
    text = as_text({"gpu": "this one"}, {(64, 32): {16: first, 128: second}, (8, 32): {16: second}})
    (tmp_path / "this-one.json").write_text(text)
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned._table.cache_clear()
    assert [tuned.find("this one", 64, 32, m) for m in (1, 17)] == [first, second]
    assert tuned.find("this one", 8, 32, 999) == second
    assert len(json.loads(text)["schedules"]) == 2
    tuned._table.cache_clear()


def test_a_table_is_asked_by_the_rows_at_or_above(monkeypatch):
    table = {(64, 32): ([16, 128], [{"block_m": 16}, {"block_m": 128}])}
    monkeypatch.setattr(tuned, "_table", lambda gpu: table if gpu == "this one" else {})
    found = [tuned.find("this one", 64, 32, m)["block_m"] for m in (1, 16, 17, 128, 9999)]
    assert found == [16, 16, 128, 128, 128]
    assert tuned.find("this one", 64, 33, 1) is None
    assert tuned.find("another", 64, 32, 1) is None


def test_a_tuned_schedule_comes_before_the_default(monkeypatch):
    monkeypatch.setattr(tuned, "find", lambda gpu, n, k, m: {"block_m": 16, "block_n": 32, "block_k": 64,
                                                             "num_warps": 4, "num_stages": 3})  # fmt: skip
    plan = plan_matmul(64, 32, 2)
    choose_schedule.cache_clear()
    found = MatmulSchedule(16, 32, 64, 4, 3)
    for m in (1, THIN, THIN + 1):
        assert choose_schedule(m, 64, plan, 2, True, 132, True, "this one") == found
        assert choose_schedule(m, 64, plan, 2, True, 132, True) != found
