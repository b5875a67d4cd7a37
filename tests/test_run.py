"""The headless runner, on tiny lessons made for each test."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat import NotebookNode, v4

from lab import run
from lab.device import ROOT

PARAMETERS = 'preset: str = "auto"  # size of the run'
NO_GPU = SimpleNamespace(is_gpu=False, name="no GPU")
SOME_GPU = SimpleNamespace(is_gpu=True, name="some GPU")


def code(source: str, *tags: str) -> NotebookNode:
    return v4.new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository for the runner to work in, on a machine without a GPU."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "current_device", lambda: NO_GPU)
    monkeypatch.setattr(run, "resolve_preset", lambda name, device: SimpleNamespace(name=name))
    return tmp_path


def add_lesson(house: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A lesson of a title, a parameters cell and one code cell for each of `cells`."""
    notebook = v4.new_notebook()
    notebook.cells = [v4.new_markdown_cell(f"# {name}"), code(parameters, "parameters"), *map(code, cells)]
    path = house / "notebooks" / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def run_main(house: Path, *arguments: str) -> int:
    return run.main([*arguments, "--out", str(house / "out")], notebooks=house / "notebooks")


def refused(house: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the runner says when it refuses; fails if it does not refuse or runs anything first."""
    with pytest.raises(SystemExit) as stop:
        run_main(house, *arguments)
    assert stop.value.code == 2
    assert not (house / "out").exists(), "something was run before the refusal"
    return capsys.readouterr().err


def printed(path: Path) -> str:
    """Everything that the executed notebook's cells printed."""
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_every_lesson_runs_even_when_one_fails(house, capsys):
    draw = (
        "import os, pathlib\nprint(os.getcwd())\n"
        "pathlib.Path('figures/gpu').mkdir(parents=True)\n"
        "[pathlib.Path('figures/gpu', name).write_text('') for name in ('a.svg', 'a.png', 'b.svg')]"
    )
    add_lesson(house, "00_draws", draw)
    add_lesson(house, "01_fails", "x = 1", "# the cell at fault\nraise RuntimeError('broken on purpose')", "x = 2")
    add_lesson(house, "02_dies", "import os\nos._exit(1)")
    add_lesson(house, "03_after", "print('still ran')")

    assert run_main(house) == 1

    out = capsys.readouterr().out
    assert re.search(r"^00_draws +[\d.]+ +2  ok$", out, re.M)
    assert re.search(r"^01_fails +[\d.]+ +0  failed$", out, re.M)
    assert re.search(r"^02_dies +[\d.]+ +0  failed$", out, re.M)
    assert re.search(r"^03_after +[\d.]+ +0  ok$", out, re.M)
    assert "01_fails, code cell 3 (# the cell at fault): RuntimeError: broken on purpose" in out
    assert "executed copy: out/01_fails.ipynb" in out
    assert "02_dies, code cell 2 (import os): the lesson's process died" in out
    assert "[2/4] 01_fails: failed" in out, "one line per lesson where there is no terminal"
    assert (house / "out" / "01_fails.ipynb").exists()
    assert printed(house / "out" / "00_draws.ipynb").strip() == str(house), "lessons run in the repository root"
    assert "still ran" in printed(house / "out" / "03_after.ipynb")


def test_success_exits_with_zero(house, capsys):
    add_lesson(house, "00_first", "print('hello')")
    add_lesson(house, "01_second", "print('world')")
    assert run_main(house, "01") == 0
    assert not (house / "out" / "00_first.ipynb").exists()
    assert "01_second: ok" in capsys.readouterr().out


def test_a_cell_that_takes_too_long_is_stopped(house, capsys):
    add_lesson(house, "00_slow", "import time\ntime.sleep(60)")
    started = time.monotonic()
    assert run_main(house, "--timeout", "1") == 1
    assert time.monotonic() - started < 30
    assert "code cell 2 (import time): a cell took longer than 1 s" in capsys.readouterr().out


def test_lessons_run_in_this_python_whatever_kernels_are_installed(house, tmp_path, monkeypatch, capsys):
    decoy = tmp_path / "jupyter" / "kernels" / "python3"
    decoy.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (decoy / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    env = "os.environ['MPLBACKEND'], os.environ['LAB_COMMIT']"
    add_lesson(house, "00_where", f"import os, sys\nprint(sys.executable, sys.path, {env})")
    assert run_main(house, "--commit", "0a1b2c") == 0, capsys.readouterr().out
    text = printed(house / "out" / "00_where.ipynb")
    assert text.startswith(sys.executable)
    assert str(house) in text
    assert text.strip().endswith("matplotlib_inline.backend_inline 0a1b2c")


def test_parameters_arrive_with_their_declared_types(house, capsys):
    declared = (
        'preset: str = "auto"\nseed: int = 0\nscale: float = 1  # the hint wins over the literal\n'
        "fast: bool = False\nsizes: list[int] = [1, 2]\nlabel = 'x'"
    )
    add_lesson(house, "00_typed", "print([preset, seed, scale, fast, sizes, label])", parameters=declared)
    given = ["seed=-3", "scale=2", "fast=true", "sizes=[1, 8, 32]", "label=7"]
    flags = [word for assignment in given for word in ("-p", assignment)]
    assert run_main(house, "--preset", "quick", *flags) == 0, capsys.readouterr().out
    expected = ["quick", -3, 2.0, True, [1, 8, 32], "7"]
    assert printed(house / "out" / "00_typed.ipynb").strip() == str(expected)


@pytest.mark.parametrize(
    ("assignment", "wanted"),
    [
        ("seed=1.5", "int"),
        ("seed=", "int"),
        ("seed=True", "int"),
        ("scale=fast", "float"),
        ("fast=1", "bool"),
        ("sizes=3", "list of int"),
        ("sizes=[1, 'a']", "list of int"),
        ("sizes=[1,", "list of int"),
    ],
)
def test_values_of_the_wrong_type_are_refused(house, capsys, assignment, wanted):
    add_lesson(
        house,
        "00_typed",
        parameters="seed: int = 0\nscale: float = 1.0\nfast: bool = False\nsizes: list[int] = [1]",
    )
    said = refused(house, capsys, "-p", assignment)
    assert f"-p {assignment}: should be {wanted}" in said


def test_unknown_parameters_are_refused_with_those_that_exist(house, capsys):
    add_lesson(house, "00_a", parameters=f"{PARAMETERS}\nseed: int = 0")
    add_lesson(house, "01_b")
    said = refused(house, capsys, "-p", "sede=1")
    assert "-p sede: 00_a declares no such parameter; it declares: preset, seed" in said
    said = refused(house, capsys, "-p", "seed=1")
    assert "-p seed: 01_b declares no such parameter; it declares: preset" in said


def test_a_preset_is_passed_only_as_the_parameter_preset(house, capsys):
    add_lesson(house, "00_none", parameters="seed: int = 0")
    add_lesson(house, "01_some")
    assert "-p preset: 00_none declares no such parameter" in refused(house, capsys, "--preset", "quick")
    twice = refused(house, capsys, "--preset", "quick", "-p", "preset=full", "01")
    assert "-p preset is given twice" in twice


def test_unknown_lessons_are_refused_with_those_that_exist(house, capsys):
    add_lesson(house, "00_a")
    add_lesson(house, "01_b")
    assert "lesson = '07' is no lesson; there are: 00_a, 01_b" in refused(house, capsys, "00", "07")
    assert "lesson = '0' fits several lessons; there are: 00_a, 01_b" in refused(house, capsys, "0")


@pytest.mark.parametrize("word", ["01", "01_b", "01_b.ipynb", "notebooks/01_b.ipynb"])
def test_lessons_go_by_number_name_or_path(house, word):
    add_lesson(house, "00_a")
    add_lesson(house, "01_b")
    add_lesson(house, "01_b_more") if word != "01" else None
    lessons = run.find_lessons(house / "notebooks")
    assert [lesson.name for lesson in run.select(lessons, [word])] == ["01_b"]


def test_the_lessons_own_folder_is_no_place_for_executed_copies(house, capsys):
    lesson = add_lesson(house, "00_first", "print(1)")
    before = lesson.read_bytes()
    with pytest.raises(SystemExit) as stop:
        run.main(["--out", str(house / "notebooks")], notebooks=house / "notebooks")
    assert stop.value.code == 2 and "the lessons themselves are there" in capsys.readouterr().err
    assert lesson.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_refused(house, capsys):
    add_lesson(house, "00_first", "print(1)")
    (house / "file").touch()
    with pytest.raises(SystemExit) as stop:
        run.main(["--out", str(house / "file" / "out")], notebooks=house / "notebooks")
    assert stop.value.code == 2 and "Not a directory" in capsys.readouterr().err


def test_an_unknown_preset_is_refused(house, monkeypatch, capsys):
    monkeypatch.undo()
    add_lesson(house, "00_a")
    said = refused(house, capsys, "--preset", "enormous")
    assert "enormous" in said
    assert "quick" in said and "full" in said


@pytest.mark.parametrize("content", ["", "{", '{"cells": 3}'])
def test_a_broken_notebook_is_refused(house, capsys, content):
    (house / "notebooks" / "00_broken.ipynb").write_text(content)
    assert "00_broken.ipynb is not a readable notebook" in refused(house, capsys, "--preset", "quick")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--timeout", "0"], "--timeout 0: should be above 0"),
        (["-p", "seed"], "-p seed: should be name=value"),
        (["--record"], "--record needs a GPU; this is no GPU"),
    ],
)
def test_other_bad_command_lines_are_refused(house, capsys, arguments, said):
    add_lesson(house, "00_a")
    assert said in refused(house, capsys, *arguments)


def test_record_needs_the_full_preset_and_the_declared_parameters(house, monkeypatch, capsys):
    monkeypatch.setattr(run, "current_device", lambda: SOME_GPU)
    add_lesson(house, "00_a", parameters=f"{PARAMETERS}\nseed: int = 0")
    said = refused(house, capsys, "--record", "--preset", "quick")
    assert "--record needs the full preset; preset = 'quick'" in said
    assert "--record takes no -p" in refused(house, capsys, "--record", "--preset", "full", "-p", "seed=1")


def test_record_writes_cleaned_outputs_back(house, monkeypatch, capsys):
    monkeypatch.setattr(run, "current_device", lambda: SOME_GPU)
    cells = (
        "import os, sys, warnings\nprint(preset, os.getcwd() + '/data', sys.prefix + '/lib')",
        "1 + 1",
        "2",
    )
    path = add_lesson(house, "00_a", *cells)
    failing = add_lesson(house, "01_fails", "print(1)", "raise RuntimeError")
    before = nbformat.read(path, as_version=4)
    failing_before = failing.read_text()

    assert run_main(house, "--record", "--preset", "full") == 1

    assert "00_a: recorded" in capsys.readouterr().out
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in before.cells]
    assert [cell.id for cell in notebook.cells] == [cell.id for cell in before.cells]
    assert [cell.metadata for cell in notebook.cells] == [cell.metadata for cell in before.cells]
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in ran] == [1, 2, 3, 4]
    assert ran[1].outputs[0].text == "full ./data <python>/lib\n"
    assert ran[2].outputs[0].execution_count == 3
    assert ran[2].outputs[0].data["text/plain"] == "2"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert "papermill" not in path.read_text()
    assert failing.read_text() == failing_before, "a lesson that failed keeps its recorded outputs"
    assert not list(path.parent.glob("*.tmp")) and not list(path.parent.glob(".*"))


def test_record_refuses_an_output_that_names_a_path_of_this_machine(house, monkeypatch, capsys):
    monkeypatch.setattr(run, "current_device", lambda: SOME_GPU)
    path = add_lesson(house, "00_a", "print('/ho' 'me/someone/file')")
    before = path.read_bytes()
    assert run_main(house, "--record", "--preset", "full") == 1
    out = capsys.readouterr().out
    assert "was not recorded: an output names a path of this machine: /ho" + "me/someone" in out
    assert path.read_bytes() == before


def test_a_lesson_edited_while_it_ran_is_not_recorded():
    executed = v4.new_notebook(cells=[code("x = 1")])
    edited = v4.new_notebook(cells=[code("x = 2")])
    with pytest.raises(ValueError, match="edited while it ran"):
        run.cleaned(edited, executed)


def test_ctrl_c_says_what_ran_and_leaves_no_process_behind(tmp_path):
    house = tmp_path
    (house / "notebooks").mkdir()
    add_lesson(house, "00_done", "x = 1")
    started = house / "pid"
    tell = f"pathlib.Path({str(started)!r}).write_text(str(os.getpid()))"
    add_lesson(house, "01_endless", f"import os, pathlib, time\n{tell}\ntime.sleep(120)")
    add_lesson(house, "02_never", "x = 1")
    call = "main(sys.argv[2:], pathlib.Path(sys.argv[1]))"
    # A shell's background job ignores Ctrl-C, and hands that on to whatever it starts.
    heed = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"import pathlib, signal, sys\n{heed}\nfrom lab.run import main\nsys.exit({call})"
    command = [sys.executable, "-c", script, str(house / "notebooks"), "--out", str(house / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for(lambda: started.exists() and started.read_text())
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert re.search(r"^00_done .* ok$", out, re.M), out
    assert re.search(r"^01_endless .* interrupted$", out, re.M), out
    assert re.search(r"^02_never .* not run$", out, re.M), out
    wait_for(lambda: not is_alive(int(started.read_text())))


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_command_lists_the_lessons_from_any_folder(tmp_path):
    command = [sys.executable, "-m", "lab.run", "--list"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for lesson in run.find_lessons(ROOT / "notebooks"):
        assert f"{lesson.name}\n    preset: str = 'auto'" in done.stdout
