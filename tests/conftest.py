"""What all tests share: the skip of GPU tests where there is no GPU, and `--record-tests`."""

from __future__ import annotations

import pytest
import torch

import kernels  # noqa: F401 - first, so that Triton interprets on a machine without a GPU
from kernels import launch
from lab.device import ROOT, current_device
from lab.records import Store

OUTCOMES = ("passed", "failed", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-tests",
        action="store_true",
        help="append how many tests passed, failed and skipped to the records of this GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--record-tests"):
        return
    if not current_device().is_gpu:
        raise pytest.UsageError(f"--record-tests needs a GPU; this is {current_device().name}")
    if config.args_source is pytest.Config.ArgsSource.ARGS or config.getoption("keyword"):
        raise pytest.UsageError("--record-tests counts a whole suite: name no files and no -k; -m gpu is fine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def nothing_remembered():
    """A test that changes what an operator would choose must not leave it behind, nor meet what another chose."""
    launch.forget()
    yield
    launch.forget()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    worker = hasattr(config, "workerinput")  # of pytest-xdist: it has seen its own share of the tests only
    if not (config.getoption("--record-tests") and complete) or worker:
        return
    stats = terminalreporter.stats
    counts = {outcome: len(stats.get(outcome, [])) for outcome in OUTCOMES}
    counts["failed"] += len(stats.get("error", []))
    device = current_device()
    row = {"suite": config.getoption("markexpr") or "all", **counts}
    Store(ROOT / "data", device.slug).append("tests", [row], device)
    terminalreporter.write_line(f"recorded in data/{device.slug}/tests.csv: {row}")
