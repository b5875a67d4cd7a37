"""Remembered launches, with a kernel that is played by Python: what is launched the second time, and what never."""

from __future__ import annotations

import ast
import re
from types import SimpleNamespace

import pytest
import torch

from kernels import launch
from kernels.matmul import addmm, matmul
from kernels.softmax import argmax, log_softmax, sample, token_log_softmax
from lab.device import ROOT

ACTIVE = {"get_current_device": lambda: 0, "get_current_stream": lambda device: "stream"}


class Compiled:
    """Stands for a compiled kernel: notes what it is run with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs = []

    def run(self, *args):
        self.runs.append(args)


class Kernel:
    """Stands for a ``triton.jit`` kernel."""

    arg_names = ("x_ptr", "other_ptr", "y_ptr", "n", "FLAG", "num_warps")

    def __init__(self):
        self.compiled = Compiled()
        self.calls = []

    @staticmethod
    def fn(x_ptr, other_ptr, y_ptr, n, FLAG=True, num_warps=4): ...

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.calls.append((grid, args, constants))
            return self.compiled

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "COMPILED", True)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(**ACTIVE)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return Kernel()


def doubling(kernel, change=lambda x: x, scratch=0):
    """An operator whose kernel has two operands and a result."""

    @launch.remembers
    def operator(x, other=None, factor=2.0, *, out=None):
        y = torch.empty(x.shape) if out is None else out
        room = launch.scratch(scratch, x.device) if scratch else other
        launch.launch(kernel, (7,), change(x), room, y, factor, num_warps=8)
        return y

    return operator


def test_the_second_call_of_a_form_runs_the_compiled_kernel_with_the_new_addresses(kernel):
    operator = doubling(kernel)
    operator(torch.ones(3, 4), torch.ones(2))
    x, other = torch.ones(3, 4), torch.ones(2)
    y = operator(x, other)
    assert len(kernel.calls) == 1
    assert y.shape == (3, 4)
    run = (7, 1, 1, "stream", "function", "metadata", None, None, None)
    assert kernel.compiled.runs == [(*run, x.data_ptr(), other.data_ptr(), y.data_ptr(), 2.0, True, 8)]


def test_launches_overlap_from_hopper_on_unless_they_are_kept_apart(kernel, monkeypatch):
    operator = doubling(kernel)
    for capable in (False, True):
        monkeypatch.setattr(launch, "cuda_capability_geq", lambda *at, capable=capable: capable)
        with launch.launches_apart():
            operator(torch.ones(4 + capable))
        operator(torch.ones(4 + capable))
    assert [constants.get("launch_pdl", False) for *_, constants in kernel.calls] == [False, False, False, True]


def test_every_kernel_that_may_overlap_waits():
    """That nothing touches memory before the wait is looked up in the compiled code, by test_compile.py."""
    waits = {}
    for path in (ROOT / "kernels").glob("*.py"):
        tree = ast.parse(path.read_text())
        imports = [node for node in tree.body if getattr(node, "module", None) == "kernels.launch"]
        if "launch" in {name.name for node in imports for name in node.names}:
            for kernel in tree.body:
                if getattr(kernel, "name", "").endswith("_kernel"):
                    waits[kernel.name] = "wait_for_previous_launch()" in map(ast.unparse, kernel.body)
    assert len(waits) == 16
    assert all(waits.values()), waits


def test_scratch_is_made_anew(kernel):
    operator = doubling(kernel, scratch=5)
    operator(torch.ones(4))
    x = torch.ones(4)
    y = operator(x)
    addresses = kernel.compiled.runs[0][9:12]
    assert addresses[::2] == (x.data_ptr(), y.data_ptr())
    assert addresses[1] not in (0, x.data_ptr(), y.data_ptr())


@pytest.mark.parametrize(
    "other",
    [
        lambda: {"x": torch.ones(4, 3)},
        lambda: {"x": torch.ones(3, 8)[:, ::2]},
        lambda: {"x": torch.ones(3, 4, dtype=torch.float64)},
        lambda: {"x": torch.ones(13)[1:].view(3, 4)},  # 4 bytes past a multiple of 16
        lambda: {"x": torch.ones(3, 4), "factor": 3.0},
        lambda: {"x": torch.ones(3, 4), "factor": 2},
        lambda: {"x": torch.ones(3, 4), "other": torch.ones(3, 4)},
    ],
)
def test_another_form_is_another_launch(kernel, other):
    operator = doubling(kernel)
    operator(x=torch.ones(3, 4))
    operator(**other())
    assert len(kernel.calls) == 2
    assert not kernel.compiled.runs


def test_operands_that_are_the_same_tensor_are_a_form_of_their_own(kernel):
    operator = doubling(kernel)
    x, other = torch.ones(4), torch.ones(4)
    operator(x, x)
    operator(x, other)
    operator(x, other)
    operator(other, other)
    assert len(kernel.calls) == 2
    assert [run[9:11] for run in kernel.compiled.runs] == [
        (x.data_ptr(), other.data_ptr()),
        (other.data_ptr(), other.data_ptr()),
    ]


@pytest.mark.parametrize("operator", [lambda k: doubling(k, lambda x: x + 0), lambda k: doubling(k, lambda x: x[1:])])
def test_a_launch_on_a_tensor_made_on_the_way_is_not_remembered(kernel, operator):
    operator = operator(kernel)
    for _ in range(3):
        operator(torch.ones(4))
    assert len(kernel.calls) == 3


def test_a_result_that_no_kernel_has_filled_is_not_remembered(kernel):
    @launch.remembers
    def operator(x):
        launch.launch(kernel, (1,), x, x, x, 1)
        return x + 1

    for _ in range(2):
        operator(torch.ones(4))
    assert len(kernel.calls) == 2


def test_out_is_never_remembered(kernel):
    operator, out = doubling(kernel), torch.empty(4)
    for _ in range(2):
        assert operator(torch.ones(4), out=out) is out
    assert len(kernel.calls) == 2


def test_values_are_looked_at_every_time(kernel):
    @launch.remembers
    def operator(x, *, validate=True):
        if validate and x[0] < 0:
            raise ValueError("x must not be negative")
        y = torch.empty_like(x)
        launch.launch(kernel, (1,), x, None, y, 1)
        return y

    operator(torch.ones(4))
    with pytest.raises(ValueError, match="negative"):
        operator(-torch.ones(4))
    for _ in range(2):
        operator(torch.ones(4), validate=False)
    assert len(kernel.calls) == 2


def test_every_time_is_every_time(kernel):
    seen = []

    @launch.remembers(every_time=lambda x: seen.append(x))
    def operator(x):
        y = torch.empty_like(x)
        launch.launch(kernel, (1,), x, None, y, 1)
        return y

    x = [torch.ones(4) for _ in range(3)]
    for some in x:
        operator(some)
    assert len(kernel.calls) == 1
    assert seen[0] is x[1]
    assert seen[1] is x[2]


def test_an_operator_within_another_is_launched_by_both(kernel):
    inner = doubling(kernel)

    @launch.remembers
    def outer(x):
        return inner(x)

    inner(torch.ones(4))
    outer(torch.ones(4))  # watched: the inner one must launch, not replay
    x = torch.ones(4)
    outer(x)
    assert len(kernel.calls) == 2
    assert kernel.compiled.runs[0][9] == x.data_ptr()


def test_an_error_leaves_nothing_watched(kernel):
    @launch.remembers
    def operator(x):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        operator(torch.ones(4))
    assert launch._watching.recording is None


def test_forget(kernel):
    operator = doubling(kernel)
    operator(torch.ones(4))
    launch.forget()
    operator(torch.ones(4))
    assert len(kernel.calls) == 2


def test_no_more_forms_than_a_limit(kernel, monkeypatch):
    monkeypatch.setattr(launch, "MOST_FORMS", 2)
    operator = doubling(kernel)
    for n in (1, 2, 3, 3):
        operator(torch.ones(n))
    assert len(kernel.calls) == 3
    assert len(kernel.compiled.runs) == 1


def test_somebody_who_wants_to_hear_of_launches_does(kernel, monkeypatch):
    operator = doubling(kernel)
    operator(torch.ones(4))
    monkeypatch.setattr(launch, "_profiled", lambda: True)
    operator(torch.ones(4))
    assert len(kernel.calls) == 2


def test_without_a_compiler_operators_run_as_they_are():
    kernel = Kernel()
    operator = doubling(kernel)
    for _ in range(2):
        operator(torch.ones(4))
    assert len(kernel.calls) == 2 or launch.COMPILED


def test_launches_are_apart_only_within_and_again_after_an_error():
    assert launch._overlap.allowed
    with launch.launches_apart():
        with pytest.raises(RuntimeError), launch.launches_apart():
            raise RuntimeError
        assert not launch._overlap.allowed
    assert launch._overlap.allowed


def test_no_kernel_is_tuned_where_it_runs():
    """A race whose winner decides how a sum is cut gives other bits on another day: tables name schedules alone."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        assert not re.search(r"\bautotune\b|\bheuristics\b", path.read_text()), path.name


X = torch.arange(20.0).view(4, 5) / 7
ROWS = torch.arange(4)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: addmm(x[:, :3], x, x.t()[:, :3], beta=0.5),
        log_softmax,
        argmax,
        lambda x: token_log_softmax(x, ROWS),
        lambda x: sample(x, ROWS / 4, 1 - ROWS / 8, ROWS, ROWS.int())[0],
    ],
    ids=["addmm", "log_softmax", "argmax", "token_log_softmax", "sample"],
)
def test_no_operator_is_traced_by_torch_compile(run):
    compiled = torch.compile(lambda x: run(x + 1) * 2, backend="eager")
    assert torch.equal(compiled(X), run(X + 1) * 2)


@pytest.mark.parametrize("m", [1, 5])
def test_compiled_code_calls_the_operator_as_it_is(m):
    """Neither traced nor frozen to the sizes that torch.compile saw first."""
    weight = torch.arange(24.0).view(6, 4)

    @torch.compile(backend="eager", dynamic=True)
    def layer(x):
        return matmul(x * 2, weight.t()) + 1

    layer(torch.ones(3, 4))
    x = torch.arange(4.0 * m).view(m, 4)
    assert torch.equal(layer(x), (x * 2) @ weight.t() + 1)
