"""The map of freedoms and the random shapes: what is recorded and drawn, and that contenders get equal inputs."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from kernels.matmul import matmul
from lab import cublaslt
from lab.charts import CHARTS
from lab.cublaslt import DTYPES, Shape, operands, random_shapes, rows_that_change
from lab.device import ROOT, Device
from lab.records import RecordError, Store

GPU = Device("NVIDIA H200", "nvidia-h200", "580.82.07", "2.11.0", "3.6.0", (9, 0), 132, 50 << 20, 141 << 30)
CPU = torch.device("cpu")


def knob(name="tile", settings=5, results=1, **more):
    return {"op": "mm", "dtype": "bfloat16", "precision": "exact", "knob": name} | {
        "settings": settings,
        "results": results,
        **more,
    }


def shape_row(impl="cublas", n=128, rows_differing=0, dtype="float32"):
    point = {"op": "mm", "impl": impl, "dtype": dtype, "m": 2048, "n": n, "k": 4096}
    return point | {"rows": 100, "rows_differing": rows_differing}


def drawn(tmp_path, chart, rows):
    """The texts of a chart drawn from these rows alone."""
    experiment = {"freedom_map": "freedom", "random_shapes": "random_shapes"}[chart]
    store = Store(tmp_path / "data", GPU.slug)
    store.append(experiment, rows, GPU, "0a1b2c")
    figure = CHARTS[chart](store, tmp_path / "figures")
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


# ------------------------------------------------------------------------------------ records


def test_counts_come_back_as_they_were_recorded(tmp_path):
    store = Store(tmp_path, GPU.slug)
    store.append("freedom", [knob(), knob("chunks of K", 4, 4)], GPU, "c")
    store.append("freedom", knob("tile", 7, 2), GPU, "c")
    newest = store.load("freedom").set_index("knob")
    assert newest.loc["tile", ["settings", "results"]].tolist() == [7, 2]
    assert newest.loc["chunks of K", "results"] == 4


@pytest.mark.parametrize("results", [0, 6, 1.0])
def test_a_number_of_results_that_cannot_be_is_refused(tmp_path, results):
    with pytest.raises(RecordError, match="results = "):
        Store(tmp_path, GPU.slug).append("freedom", knob(settings=5, results=results), GPU, "c")


def test_more_rows_differing_than_compared_are_refused(tmp_path):
    with pytest.raises(RecordError, match="rows_differing = 101 of only rows = 100"):
        Store(tmp_path, GPU.slug).append("random_shapes", shape_row(rows_differing=101), GPU, "c")


# ------------------------------------------------------------------------------------ charts


def test_the_map_shows_results_of_settings(tmp_path):
    rows = [knob(), knob("chunks of K", 4, 3), knob("tile", 6, 2, dtype="float32", precision="tf32x3")]
    text = drawn(tmp_path, "freedom_map", rows)
    for expected in ("1 / 5", "3 / 4", "2 / 6", "mm · bf16", "mm · fp32 · tf32x3", "chunks\nof K"):
        assert expected in text


def test_bars_count_shapes_not_rows(tmp_path):
    rows = [shape_row(n=n, rows_differing=differing) for n, differing in ((128, 100), (256, 1), (512, 0))]
    rows += [shape_row("batch_invariant", n) for n in (128, 256, 512)]
    text = drawn(tmp_path, "random_shapes", rows)
    assert "2 of 3" in text and "0 of 3" in text


def test_one_contender_and_one_shape_can_be_drawn(tmp_path):
    assert "1 of 1" in drawn(tmp_path, "random_shapes", [shape_row(rows_differing=7, dtype="bfloat16")])


# ------------------------------------------------------------------------------------ shapes and inputs


def test_shapes_are_the_same_each_time_and_of_every_kind():
    shapes = random_shapes(240, seed=0)
    assert shapes == random_shapes(240, seed=0) and shapes != random_shapes(240, seed=1)
    assert shapes[:20] == random_shapes(20, seed=0), "a short look sees the first of the same shapes"
    assert len(set(shapes)) == 240
    assert [sum(s.dtype == dtype for s in shapes) for dtype in DTYPES] == [80, 80, 80]
    assert all(1 <= size <= 8192 for s in shapes for size in (s.n, s.k))
    kinds = [s.n % 128 == 0 for s in shapes], [s.n % 16 == 8 for s in shapes], [s.n % 2 == 1 for s in shapes]
    assert all(sum(kind) >= 40 for kind in kinds)
    assert all((s.n % 128 == 0) == (s.k % 128 == 0) for s in shapes)


def test_inputs_depend_on_shape_and_seed_alone():
    shape = Shape("float32", 24, 16)
    torch.manual_seed(5)
    first = operands(shape, 0, CPU, rows=4)
    torch.randn(3)
    again, other = operands(shape, 0, CPU, rows=4), operands(shape, 1, CPU, rows=4)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (4, 16) and first[1].shape == (16, 24)


def counted(mm, whole=40):
    (row,) = rows_that_change(mm, [Shape("float32", 12, 8)], 0, CPU, sizes=(1, 2, 7, 33), whole=whole)
    return row


def exact(a, b):
    """A product in fp64, one term after the other: no batch size can move it."""
    total = torch.zeros(len(a), b.shape[1], dtype=torch.float64)
    for k in range(len(b)):
        total += a[:, k, None].double() * b[k].double()
    return total.float()


def test_rows_are_counted_over_all_batches():
    assert counted(exact) == {"dtype": "float32", "n": 12, "k": 8, "m": 40, "rows": 43, "rows_differing": 0}
    nudge = 1 + 2**-22
    assert counted(lambda a, b: exact(a, b) * (nudge if len(a) < 7 else 1))["rows_differing"] == 3


def test_a_wrong_product_is_not_counted():
    with pytest.raises(ValueError, match="wrong, not just different"):
        counted(lambda a, b: 1.001 * exact(a, b))


# ------------------------------------------------------------------------------------ the starved library


def test_the_workspace_has_to_be_set_before_the_process_starts(monkeypatch):
    for name in cublaslt.STARVED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="CUBLASLT_WORKSPACE_SIZE=1"):
        cublaslt.starve()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_process_says_so():
    with pytest.raises(RuntimeError, match="needs a GPU"):
        cublaslt.run_apart(1, seed=0)


def test_a_process_that_fails_or_hangs_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit status 1"):
        cublaslt.run_apart(1, seed=0)

    def hangs(*args, **options):
        raise subprocess.TimeoutExpired(args[0], options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(RuntimeError, match="more than 300 s"):
        cublaslt.run_apart(1, seed=0)


@pytest.mark.gpu
def test_the_starved_library_answers_for_the_same_shapes():
    rows = cublaslt.run_apart(6, seed=0)
    assert [Shape(row["dtype"], row["n"], row["k"]) for row in rows] == random_shapes(6, seed=0)
    assert all(row["rows"] == sum(cublaslt.SIZES) for row in rows)


@pytest.mark.gpu
def test_ours_keeps_its_rows_on_random_shapes():
    for row in rows_that_change(matmul, random_shapes(12, seed=7), 7, torch.device("cuda")):
        assert row["rows_differing"] == 0, row


@pytest.mark.gpu
def test_inputs_are_the_same_in_another_process():
    shape = Shape("bfloat16", 256, 128)
    code = (
        "import json, torch; from lab.cublaslt import Shape, operands;"
        f"a, b = operands(Shape(**{asdict(shape)}), 3, torch.device('cuda'));"
        "print(json.dumps([a.double().sum().item(), b.double().sum().item()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True
    )
    here = [x.double().sum().item() for x in operands(shape, 3, torch.device("cuda"))]
    assert json.loads(done.stdout) == here
