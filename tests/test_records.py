"""The records: nothing measured is ever lost, and nothing damaged is ever read as if it were whole."""

import re
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest

from lab import records
from lab.records import EXPERIMENTS, PROVENANCE, TIMES, MissingRecord, RecordError, Store, reference


@dataclass(frozen=True)
class Gpu:
    """What a record takes from lab.device.Device."""

    name: str = "NVIDIA H200"
    slug: str = "nvidia-h200"
    driver: str = "580.82.07"
    torch: str = "2.11.0"
    triton: str = "3.6.0"


GPU = Gpu()


def point(m=1, ms=0.5, **changes):
    row = {"op": "mm", "impl": "cublas", "dtype": "bfloat16", "model": "llama-3-8b", "layer": "o", "tp": 1}
    row |= {"m": m, "n": 4096, "k": 4096, "median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms}
    return row | changes


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_now", lambda: "2026-11-21T10:00:00Z")
    return Store(tmp_path, "nvidia-h200")


def append(store, rows, device=GPU, commit="0a1b2c"):
    store.append("matmul", rows, device, commit)


# ------------------------------------------------------------------------------------ what is written


def test_a_row_comes_back_with_its_provenance(store):
    append(store, point(m=7, ms=0.0123456))
    (row,) = store.load("matmul").to_dict("records")
    assert {name: row[name] for name in ("op", "impl", "dtype", "m", "n", "k", "tp")} == {
        "op": "mm", "impl": "cublas", "dtype": "bfloat16", "m": 7, "n": 4096, "k": 4096, "tp": 1,
    }  # fmt: skip
    assert row["median_ms"] == 0.0123456
    assert [row[name] for name in PROVENANCE] == [
        "NVIDIA H200", "580.82.07", "2.11.0", "3.6.0", "0a1b2c", "2026-11-21T10:00:00Z",
    ]  # fmt: skip


def test_file_is_stable_text_with_one_line_per_row(store):
    append(store, [point(m=np.int64(8), ms=np.float32(0.25), tp=True), point(m=16, layer="a, b")])
    origin = "NVIDIA H200,580.82.07,2.11.0,3.6.0,0a1b2c,2026-11-21T10:00:00Z"
    assert store.path("matmul").read_bytes().decode() == (
        "op,impl,dtype,model,layer,tp,m,n,k,median_ms,p20_ms,p80_ms,gpu,driver,torch,triton,commit,measured_at\n"
        f"mm,cublas,bfloat16,llama-3-8b,o,1,8,4096,4096,0.25,0.225,0.275,{origin}\n"
        f'mm,cublas,bfloat16,llama-3-8b,"a, b",1,16,4096,4096,0.5,0.45,0.55,{origin}\n'
    )
    assert store.load("matmul")["layer"].tolist() == ["o", "a, b"]


def test_appending_leaves_earlier_bytes_as_they_are(store):
    append(store, point(m=1))
    before = store.path("matmul").read_bytes()
    append(store, [point(m=2), point(m=4)])
    after = store.path("matmul").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == before.count(b"\n") + 2


def test_newest_row_of_a_point_counts_and_older_ones_stay(store, monkeypatch):
    append(store, [point(m=1, ms=0.5), point(m=2, ms=0.6)])
    monkeypatch.setattr(records, "_now", lambda: "2026-11-22T10:00:00Z")
    append(store, point(m=1, ms=0.4))
    monkeypatch.setattr(records, "_now", lambda: "2026-11-20T10:00:00Z")
    append(store, point(m=1, ms=0.9))  # a file merged from elsewhere: later in the file, but older
    assert store.load("matmul").set_index("m")["median_ms"].to_dict() == {1: 0.4, 2: 0.6}
    assert store.load("matmul", newest=False)["median_ms"].tolist() == [0.5, 0.6, 0.4, 0.9]


def test_of_two_rows_of_one_second_the_later_counts(store):
    append(store, [point(ms=0.5), point(ms=0.3)])
    assert store.load("matmul")["median_ms"].tolist() == [0.3]


def test_no_rows_is_no_file(store):
    append(store, [])
    assert not store.has("matmul") and not store.folder.exists()


def test_other_experiments_have_their_own_values(store):
    store.append(
        "invariance",
        {"op": "mm", "impl": "x", "dtype": "int8", "case": "NA", "rows": 4, "rows_differing": 0},
        GPU,
        "c",
    )
    store.append("tests", {"suite": "gpu", "passed": 3, "failed": 0, "skipped": 1}, GPU, "c")
    assert store.load("invariance")[["case", "rows_differing"]].values.tolist() == [["NA", 0]]
    assert store.load("tests")["passed"].tolist() == [3]


def test_every_experiment_begins_with_keys_and_ends_with_provenance():
    for kind in EXPERIMENTS.values():
        assert kind.columns == kind.keys + kind.values + PROVENANCE
        assert len(set(kind.columns)) == len(kind.columns)
    assert EXPERIMENTS["rms_norm"].values == TIMES


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (point(ms=float("nan")), "median_ms = nan"),
        (point(p80_ms=float("inf")), "p80_ms = inf"),
        (point(ms=-1.0), "median_ms = -1.0"),
        (point(ms=0.0), "median_ms = 0.0"),
        (point(median_ms=None), "median_ms = None"),
        (point(p20_ms=0.7), "is not between"),
        (point(m=-1), "m = -1"),
        (point(m=2.5), "m = 2.5"),
        (point(m="8"), "m = '8'"),
        (point(impl=""), "impl = ''"),
        (point(impl="a\nb"), "impl = 'a\\nb'"),
        (point(dtype=np.float32), "dtype = <class 'numpy.float32'>"),
        ({"op": "mm"}, "missing: impl, dtype"),
        (point(hidden=3), "unknown: hidden"),
        (point(gpu="NVIDIA H100"), "unknown: gpu"),
        ([point(), point(ms=float("nan"))], "rows[1]"),
    ],
)
def test_a_bad_row_is_refused_by_name_and_changes_nothing(store, rows, said):
    append(store, point(m=99))
    before = store.path("matmul").read_bytes()
    with pytest.raises(RecordError, match=re.escape(said)):
        append(store, rows)
    assert store.path("matmul").read_bytes() == before


def test_more_rows_differing_than_rows_is_refused(store):
    row = {"op": "mm", "impl": "x", "dtype": "int8", "case": "c", "rows": 4, "rows_differing": 5}
    with pytest.raises(RecordError, match="rows_differing = 5 of only rows = 4"):
        store.append("invariance", row, GPU, "c")
    row = {"op": "generate", "impl": "x", "dtype": "int8", "model": "tiny", "tokens": 4, "rows_differing": 5}
    row |= {"largest_difference": 0.0, "kl": 0.0}
    with pytest.raises(RecordError, match="rows_differing = 5 of only tokens = 4"):
        store.append("trainer_sampler", row, GPU, "c")
    store.append("trainer_sampler", row | {"rows_differing": 0}, GPU, "c")


def test_unknown_experiment_names_those_that_exist(store):
    for use in (store.load, store.has, lambda name: store.append(name, [], GPU, "c")):
        with pytest.raises(RecordError, match=r"'matmull' is unknown; there are: rms_norm, matmul"):
            use("matmull")


def test_another_gpu_cannot_write_here(store):
    with pytest.raises(RecordError, match=r"'NVIDIA A100': .* is a data folder for another GPU"):
        append(store, point(), replace(GPU, name="NVIDIA A100", slug="nvidia-a100"))
    with pytest.raises(RecordError, match="another GPU"):  # a slug that was made up does not help
        append(store, point(), replace(GPU, name="NVIDIA A100"))
    assert not store.has("matmul")


def test_the_interpreter_is_never_recorded(tmp_path):
    cpu = replace(GPU, name="CPU (Triton interpreter)", slug="cpu")
    with pytest.raises(RecordError, match="without a GPU is never recorded"):
        append(Store(tmp_path, "cpu"), point(), cpu)


def test_a_read_only_store_refuses_to_write(store, tmp_path):
    with pytest.raises(RecordError, match="reading only"):
        append(Store(tmp_path, "nvidia-h200", writable=False), point())
    assert not store.has("matmul")


@pytest.mark.parametrize("slug", ["", "../other", "NVIDIA H200"])
def test_a_slug_is_a_folder_name(tmp_path, slug):
    with pytest.raises(RecordError, match="slug = "):
        Store(tmp_path, slug)


# ------------------------------------------------------------------------------------ what is detected


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: raw[:-9], "line 4: cut off"),
        (lambda raw: raw[:-1], "line 4: cut off"),
        (lambda raw: b"", "line 1: the file is empty"),
        (lambda raw: raw.split(b"\n", 1)[1], "line 1: header 'mm,"),
        (lambda raw: raw.replace(b"p20_ms,p80_ms", b"p80_ms,p20_ms"), "line 1: header "),
        (lambda raw: raw.replace(b"\nmm,cublas", b"\ncublas", 1), "line 2: 17 columns, should be 18"),
        (lambda raw: raw.replace(b",2,4096", b",2,1,4096"), "line 3: 19 columns, should be 18"),
        (lambda raw: raw.replace(b"\nmm,", b"\n\nmm,", 1), "line 2: 0 columns"),
        (lambda raw: raw.replace(b",2,4096", b',"2,4096'), "line 3: unexpected end of data"),
        (lambda raw: raw.replace(b",2,4096", b",two,4096"), "line 3: m = 'two'"),
        (lambda raw: raw.replace(b",0.9,1.1,", b",nan,1.1,"), "line 4: p20_ms = 'nan'"),
        (lambda raw: raw.replace(b"10:00:00Z\n", b"\n", 1), "line 2: measured_at = '2026-11-21T'"),
        (lambda raw: raw.replace(b"NVIDIA H200", b"NVIDIA A100", 1), "line 2: gpu = 'NVIDIA A100'"),
        (lambda raw: raw.replace(b"llama", b"ll\xffma", 1), "line 2: not UTF-8"),
        (lambda raw: raw.replace(b"llama", b"ll\x00ma", 1), "line 2: model = 'll\\x00ma-3-8b'"),
    ],
)
def test_damage_is_named_by_file_and_line_and_stops_appending(store, damage, said):
    append(store, [point(m=1), point(m=2), point(m=4, ms=1.0)])
    path = store.path("matmul")
    raw = path.read_bytes()
    path.write_bytes(damage(raw))
    assert path.read_bytes() != raw
    for use in (lambda: store.load("matmul"), lambda: append(store, point(m=8))):
        with pytest.raises(RecordError) as caught:
            use()
        assert not isinstance(caught.value, MissingRecord)
        assert f"{path}, {said}" in str(caught.value)
    assert path.read_bytes() == damage(raw)


def test_missing_says_what_would_measure_it(store):
    with pytest.raises(MissingRecord, match=r"matmul\.csv does not exist yet: lesson 03 .*lab\.run 03"):
        store.load("matmul")
    with pytest.raises(MissingRecord, match="make test"):
        store.load("tests")


# ------------------------------------------------------------------------------------ crashes and company

CRASHES = """
import os, random, signal, sys, time
from pathlib import Path
from lab import records
from tests.test_records import GPU, point

folder = Path(sys.argv[1])
store = records.Store(folder, GPU.slug)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_file(path, content):
    path.with_name(f".{path.name}.tmp").write_bytes(content[: len(content) // 2])
    die()

def replace_then_die(*names, real=os.replace):
    real(*names)
    die()

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid

# One process after another dies at each step of an append.
store.append("matmul", point(m=1), GPU, "c")
steps = [(records, "write_atomically", half_a_file), (os, "fsync", die), (os, "replace", die),
         (os, "replace", replace_then_die)]
for index, (module, name, stand_in) in enumerate(steps):
    def work():
        setattr(module, name, stand_in)
        store.append("matmul", point(m=100 + index), GPU, "c")
    _, status = os.waitpid(child(work), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, (index, status)
    store.load("matmul")
    store.append("matmul", point(m=200 + index), GPU, "c")
found = store.load("matmul")["m"].tolist()
assert found == [1, 200, 201, 202, 103, 203], found

# Many append at once; some are killed wherever they happen to be. What append returned for has to be there.
def many(worker):
    with open(folder / f"done{worker}", "wb", buffering=0) as done:
        for index in range(60):
            store.append("matmul", point(m=1000 * (worker + 1) + index), GPU, "c")
            done.write(b"%d\\n" % (1000 * (worker + 1) + index))

random.seed(int(sys.argv[2]))
workers = [child(lambda: many(worker)) for worker in range(6)]
for pid in workers[:3]:
    time.sleep(random.uniform(0.02, 0.12))
    os.kill(pid, signal.SIGKILL)
killed = [os.WIFSIGNALED(os.waitpid(pid, 0)[1]) for pid in workers]
done = {int(line) for path in folder.glob("done*") for line in path.read_bytes().split(b"\\n")[:-1]}
found = store.load("matmul", newest=False)["m"].tolist()
assert done <= set(found), sorted(done - set(found))
assert len(found) == len(set(found)), "a row was written twice"
assert {1000 * worker + index for worker in (4, 5, 6) for index in range(60)} <= set(found)
print(len(done), "appended,", sum(killed), "killed")
"""


def test_killed_in_the_middle_of_an_append_nothing_is_lost(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path), "0"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=records.ROOT,
    )
    assert ran.returncode == 0, ran.stderr
    appended, killed = map(int, re.findall(r"\d+", ran.stdout))
    assert appended >= 180 and killed > 0


def test_a_lock_that_is_never_given_back_is_an_error(store, monkeypatch):
    monkeypatch.setattr(records, "LOCK_SECONDS", 0.02)
    append(store, point(m=1))
    with records._locked(store.folder), pytest.raises(RecordError, match="locked by another process"):
        append(store, point(m=2))
    append(store, point(m=2))
    assert store.load("matmul")["m"].tolist() == [1, 2]


# ------------------------------------------------------------------------------------ provenance, reference


def test_provenance_in_one_line(store, monkeypatch):
    append(store, point(m=1))
    assert store.provenance("matmul") == ("NVIDIA H200 · torch 2.11.0 · triton 3.6.0 · 2026-11-21 · commit 0a1b2c")
    for day, commit in (("22", "bbb"), ("24", "ccc")):
        monkeypatch.setattr(records, "_now", lambda day=day: f"2026-11-{day}T10:00:00Z")
        append(store, point(m=int(day)), replace(GPU, torch="2.13.0"), commit)
    assert store.provenance("matmul") == (
        "NVIDIA H200 · torch 2.11.0, 2.13.0 · triton 3.6.0 · 2026-11-21 to 2026-11-24 · 3 commits, 0a1b2c to ccc"
    )
    newest = store.load("matmul").query("m > 20")
    assert store.provenance("matmul", newest).endswith("commits bbb, ccc")
    append(store, point(m=30), commit="0123456789abcdef0123456789abcdef01234567+dirty")
    assert store.provenance("matmul", store.load("matmul").query("m == 30")).endswith("commit 0123456789ab+dirty")


def test_reference_charts():
    norm, matmul = reference("rms_norm"), reference("matmul")
    assert norm.columns.tolist() == matmul.columns.tolist() == ["series", "tokens", "value"]
    assert norm.groupby("series")["tokens"].apply(list).map(tuple).nunique() == 1
    assert sorted(norm["tokens"].unique()) == [1, 8, 32, 128, 256, 512, 1024, 2048, 4096]
    assert sorted(matmul["tokens"].unique()) == [2**power for power in range(14)]
    assert len(norm) == 27 and len(matmul) == 28
    last = norm[norm["tokens"] == 4096].set_index("series")["value"].to_dict()
    assert last == {
        "Non-batch-invariant (CUDA)": 0.15,
        "Batch-invariant (Python)": 1.25,
        "Batch-invariant (Triton)": 0.21,
    }
    with pytest.raises(RecordError, match="there are: forward_latency, matmul, rms_norm"):
        reference("nothing")


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "lesson.ipynb"
    path.write_text("old")

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(records.os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        records.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_reference_files_say_where_they_come_from():
    for path in sorted((records.ROOT / "data" / "reference").glob("*.csv")):
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        for word in ("source: ", "unit of value: ", "by eye"):
            assert any(word in line for line in head), f"{path.name} lacks {word!r}"


def test_committed_records_can_be_read():
    for folder in sorted((records.ROOT / "data").iterdir()):
        if folder.is_dir() and folder.name != "reference":
            for path in sorted(folder.glob("*.csv")):
                assert len(Store(folder.parent, folder.name).load(path.stem)), f"{path} holds no rows"


def test_data_readme_describes_every_experiment_and_column():
    text = (records.ROOT / "data" / "README.md").read_text()
    for kind in EXPERIMENTS.values():
        assert f"| `{kind.name}.csv` | {', '.join(kind.keys)} |" in text
        for column in kind.columns:
            assert re.search(rf"^\|.*`{column}`.*\|", text, re.MULTILINE), column


def test_what_was_checked_once_is_not_checked_again(store, monkeypatch):
    append(store, [point(), point(2)])
    assert len(store.load("matmul", newest=False)) == 2
    seen = []
    monkeypatch.setattr(
        records, "_check_row", lambda cells, slug, check=records._check_row: seen.append(check(cells, slug))
    )
    append(store, point(3))
    assert len(store.load("matmul", newest=False)) == 3
    assert len(seen) == 2  # the new row, when it is written and when it is read


def test_damage_to_what_was_checked_before_is_found(store):
    append(store, [point(), point(2)])
    store.load("matmul")
    path = store.path("matmul")
    path.write_bytes(path.read_bytes().replace(b"bfloat16", b"bfloat,16", 1))
    with pytest.raises(RecordError, match=r"line 2: .* columns"):
        store.load("matmul")
    with pytest.raises(RecordError, match=r"line 2: .* columns"):
        append(store, point(3))
