"""The tuner's bookkeeping; that its candidates are bit-equal is checked on the GPU, before each is timed."""

import json

import pytest

from kernels import tuned
from kernels.matmul import MatmulSchedule, choose_schedule
from kernels.plan import plan_matmul
from lab.tune import MODELS, TOKENS, VARIANTS, candidates, fastest_few, main, shard

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


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("shape", [(768, 4096), (6144, 4096)])
def test_every_candidate_fits_its_plan(m, shape):
    plan = plan_matmul(*shape, 2)
    tried = candidates(m, plan, wgmma=True)
    assert len(tried) == len(set(tried)) > 3
    assert all(schedule.fits(plan) for schedule in tried)
    assert not any(schedule.specialised for schedule in candidates(m, plan, wgmma=False))


def test_tuning_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("lab.tune.current_device", lambda: type("CPU", (), {"is_gpu": False}))
    with pytest.raises(SystemExit):
        main([])
    assert "torch sees none here" in capsys.readouterr().err


TABLES = sorted(tuned.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_shipped_table_names_its_origin_and_holds_valid_schedules(path):
    table = json.loads(path.read_text())
    assert tuned.path_of(table["gpu"]) == path
    assert {"torch", "triton", "commit", "measured_at"} <= set(table)
    for shape in table["shapes"]:
        plan = plan_matmul(shape["n"], shape["k"], 2)
        assert [row["m"] for row in shape["rows"]] == sorted(row["m"] for row in shape["rows"])
        assert all(MatmulSchedule(**row["schedule"]).fits(plan) for row in shape["rows"])


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_model_needs_at_most_a_dozen_variants(path):
    rows = {(shape["n"], shape["k"]): shape["rows"] for shape in json.loads(path.read_text())["shapes"]}
    for model in MODELS:
        for tp in (1, 2, 4, 8):
            used = [row["schedule"] for layer in MODELS[model] for row in rows[shard(model, layer, tp)]]
            assert len({MatmulSchedule(**schedule) for schedule in used}) <= VARIANTS


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
    assert choose_schedule(1, 64, plan, 2, True, 132, True, "this one") == MatmulSchedule(16, 32, 64, 4, 3)
    assert choose_schedule(1, 64, plan, 2, True, 132, True) != MatmulSchedule(16, 32, 64, 4, 3)
