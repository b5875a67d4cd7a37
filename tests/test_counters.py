"""The profiler's table, read from text; and what is said where there is no profiler."""

from __future__ import annotations

import stat

import pytest

from kernels.matmul import MatmulSchedule
from lab import counters
from lab.counters import Product

HEAD = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
ROWS = (
    '"0","7","_matmul_kernel","Command line profiler metrics","dram__bytes_read.sum","byte","33,554,432"',
    '"0","7","_matmul_kernel","Command line profiler metrics","sm__cycles_active.avg","cycle","12,345.67"',
    '"1","7","_single_tile_kernel","Command line profiler metrics","dram__bytes_read.sum","byte","512"',
)
TABLE = "\n".join(["==PROF== Connected to process 7", "what the program prints", HEAD, *ROWS]) + "\n"
PRODUCTS = [
    Product("ours", 1, 32, 64, MatmulSchedule(16, 32, 32, 4, 2, swap=True)),
    Product("single_tile", 1, 32, 64, None),
]


def test_readings_are_kept_apart_by_kernel_and_thousands_put_together():
    first, second = counters.readings(TABLE)
    assert first == {"dram__bytes_read.sum": 33554432.0, "sm__cycles_active.avg": 12345.67}
    assert second == {"dram__bytes_read.sum": 512.0}


def test_text_without_a_table_is_an_error():
    with pytest.raises(ValueError, match="no table"):
        counters.readings("==PROF== Disconnected\n")


@pytest.fixture
def profiler(tmp_path, monkeypatch):
    """Puts a program in the profiler's place that knows two counters and then runs ``script``."""

    def install(script: str):
        path = tmp_path / "ncu"
        query = (
            'if [ "$1" = --query-metrics ]; then echo "dram__bytes_read Counter"; echo sm__cycles_active; exit; fi'
        )
        path.write_text(f"#!/bin/sh\n{query}\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(counters, "find_ncu", lambda: str(path))

    return install


def test_only_counters_that_this_gpu_has_are_asked_for(profiler, tmp_path):
    asked, table = tmp_path / "asked", tmp_path / "table"
    table.write_text(TABLE)
    profiler(f'echo "$@" > {asked}; cat {table}')
    found = counters.profile(PRODUCTS)
    assert [reading["dram__bytes_read.sum"] for reading in found] == [33554432.0, 512.0]
    assert "--metrics dram__bytes_read.sum,sm__cycles_active.avg " in asked.read_text()


def test_another_number_of_kernels_is_an_error(profiler, tmp_path):
    table = tmp_path / "table"
    table.write_text(TABLE)
    profiler(f"cat {table}")
    with pytest.raises(RuntimeError, match="2 kernels of 1"):
        counters.profile(PRODUCTS[:1])


def test_missing_permission_is_said_in_one_line(profiler):
    profiler("echo '==PROF== Connected'; echo '==ERROR== ERR_NVGPUCTRPERM - no permission'")
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        counters.profile(PRODUCTS)


def test_a_machine_without_a_profiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    monkeypatch.setattr(counters, "Path", lambda path: tmp_path)
    with pytest.raises(RuntimeError, match="not installed"):
        counters.find_ncu()


def test_the_profiled_program_calls_every_product_once(monkeypatch):
    called = []
    monkeypatch.setattr(counters, "matmul", lambda a, b, schedule: called.append((*a.shape, b.shape[1], schedule)))
    monkeypatch.setattr(counters, "single_tile", lambda a, b: called.append((*a.shape, b.shape[1], None)))
    jobs = counters.json.dumps([counters.asdict(product) for product in PRODUCTS])
    assert counters.main([jobs]) == 0
    assert called == [(1, 64, 32, PRODUCTS[0].schedule), (1, 64, 32, None)]
