"""The house itself: one set of pins, make targets that do what they say, no file that should not be here."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lab.device import ROOT
from lab.run import MACHINE_PATH

LARGEST_FILE = 1_500_000  # bytes
LARGEST_WEIGHTS = 8_000_000
LARGEST_RECORD = 6_000_000  # a table of measurements grows with every recording, matmul.csv by 0.5 MB


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- pins


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))["project"]


@pytest.fixture(scope="module")
def pins(project: dict) -> list[str]:
    return project["dependencies"] + project["optional-dependencies"]["dev"]


def test_every_pin_is_exact(pins):
    inexact = [pin for pin in pins if not re.fullmatch(r"[a-z][a-z0-9-]*==\d[\w.]*", pin)]
    assert not inexact


def test_environment_yml_has_the_same_pins(project, pins):
    yaml = pytest.importorskip("yaml")
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["name"] == project["name"]
    (by_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert sorted(by_pip) == sorted([*pins, "-e ."])


@pytest.mark.parametrize(("file", "entry"), [("environment.yml", r" +- [^:]+"), ("pyproject.toml", r'  "[\w-]+==.*')])
def test_every_dependency_says_what_it_is_for(file, entry):
    lines = [line for line in read(file).splitlines() if re.fullmatch(entry, line.split(" #")[0])]
    assert len(lines) > 10
    silent = [line for line in lines if not re.search(r" # .{6,}", line)]
    assert not silent


def test_the_version_is_not_taken_for_hugging_faces_kernels(project):
    major, minor, *_ = map(int, project["version"].split("."))
    assert (major, minor) < (0, 18), "transformers would use our kernels/ as the package of that name on PyPI"


def test_hook_and_ci_lint_with_the_one_pinned_ruff(pins):
    assert [pin for pin in pins if pin.startswith("ruff==")]
    assert "entry: make lint" in read(".pre-commit-config.yaml")
    assert "make lint" in read(".ci/run")
    others = [
        name for name in (".pre-commit-config.yaml", ".ci/run", "Makefile") if re.search(r"ruff==|rev:", read(name))
    ]
    assert not others, "a second place that names a version of ruff"


# --------------------------------------------------------------------------------------------------- commands


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", read("Makefile"), re.M))


@pytest.mark.parametrize("file", ["README.md", ".ci/run"])
def test_the_make_commands_that_are_named_exist(file):
    named = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(code_of(file))))
    assert {"figures", "test"} <= named
    assert named <= make_targets()


def code_of(file: str) -> list[str]:
    """The lines of a file that are commands: all of a script, the code blocks and code spans of Markdown."""
    text = read(file)
    if not file.endswith(".md"):
        return text.splitlines()
    return re.findall(r"^ {4}.*|`[^`\n]+`|(?<=^```)[^`]+", text, re.M)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with stand-ins for Python and for what it would install; `calls` notes their arguments."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    stand_in(
        checkout / "python",
        "case $2 in *ensurepip*) [ ! -e no-venv ];; *version_info*) [ ! -e too-old ];; esac",
    )
    return checkout


def stand_in(path: Path, script: str) -> None:
    """A program in place of python: it notes its call, makes a .venv if asked to, then does `script`."""
    path.write_text(
        "#!/bin/sh\n"
        'echo "$@" >> calls\n'
        '[ "$2" = venv ] && mkdir -p .venv/bin && cp inside .venv/bin/python && exit 0\n'
        f"{script}\n"
    )
    path.chmod(0o755)
    inside = path.with_name("inside")
    inside.write_text('#!/bin/sh\necho "inside $@" >> calls\ncase "$*" in *pip*) [ ! -e no-network ];; esac\n')
    inside.chmod(0o755)


def run_make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` as from a shell, also where the tests themselves were started by `make test ARGS=...`."""
    environment = {name: value for name, value in os.environ.items() if name not in MAKE_VARIABLES}
    return subprocess.run(["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True)


MAKE_VARIABLES = {
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
    "MAKEOVERRIDES",
    "ARGS",
    "PRESET",
    "PYTHON",
    "TORCH_INDEX",
}


def make(checkout: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit status, what was printed, and the calls of the stand-ins it took but for looks at versions."""
    (checkout / "calls").unlink(missing_ok=True)
    done = run_make(checkout, *arguments, "PYTHON=./python", "TORCH_INDEX=")
    noted = (checkout / "calls").read_text().splitlines() if (checkout / "calls").exists() else []
    calls = [call for call in noted if not re.search(r"-c (import|pass)|--version", call)]
    return done.returncode, done.stdout + done.stderr, "\n".join(calls)


def test_a_first_run_sets_up_and_a_second_does_not(checkout):
    status, said, calls = make(checkout, "test", "ARGS=-k one")
    assert status == 0, said
    assert "-m venv --clear .venv" in calls
    assert "install --quiet --editable .[dev]" in calls
    assert calls.endswith("inside -m pytest -k one")
    assert make(checkout, "test")[2] == "inside -m pytest"


def test_figures_runs_the_lessons_and_redraws_even_when_a_lesson_fails(checkout):
    make(checkout, "test")
    status, _, calls = make(checkout, "figures", "PRESET=quick")
    assert status == 0
    assert calls == "inside -m lab.run --preset quick\ninside -m lab.charts"
    with (checkout / ".venv/bin/python").open("a") as file:
        file.write('case "$*" in *lab.run*) exit 1;; esac\n')
    status, _, calls = make(checkout, "figures")
    assert status != 0
    assert calls.endswith("inside -m lab.charts")


def test_an_interrupted_set_up_starts_over(checkout):
    (checkout / "no-network").touch()
    status, _, calls = make(checkout, "test")
    assert status != 0
    assert "pytest" not in calls
    (checkout / "no-network").unlink()
    status, _, calls = make(checkout, "test")
    assert status == 0
    assert "venv --clear" in calls and calls.endswith("inside -m pytest")


def test_changed_pins_install_on_top(checkout):
    make(checkout, "test")
    pyproject = checkout / "pyproject.toml"
    stamp = (checkout / ".venv/.ready").stat().st_mtime
    os.utime(pyproject, (stamp + 5, stamp + 5))
    _, _, calls = make(checkout, "test")
    assert "--editable" in calls
    assert "venv --clear" not in calls


def test_a_broken_or_moved_environment_is_made_anew(checkout):
    make(checkout, "test")
    (checkout / ".venv/bin/python").unlink()
    assert "venv --clear" in make(checkout, "test")[2]
    moved = checkout.rename(checkout.with_name("moved"))
    assert "venv --clear" in make(moved, "test")[2]


def test_targets_in_parallel_set_up_once(checkout):
    status, said, calls = make(checkout, "-j", "3", "test", "charts", "lint")
    assert status == 0, said
    assert calls.count("--editable") == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [("too-old", "is not Python 3.11 or newer"), ("no-venv", "apt install python3-venv")],
)
def test_a_python_that_will_not_do_is_named(checkout, fault, message):
    (checkout / fault).touch()
    status, said, calls = make(checkout, "test")
    assert status != 0
    assert message in said
    assert not calls


def test_a_python_that_does_not_exist_is_named(checkout):
    done = run_make(checkout, "test", "PYTHON=nowhere")
    assert done.returncode != 0
    assert "PYTHON = nowhere is not Python 3.11 or newer" in done.stderr


def test_make_help_lists_every_target():
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    done = run_make(ROOT)
    assert done.returncode == 0, done.stderr
    listed = set(re.findall(r"^  make ([a-z]+) +\S", done.stdout, re.M))
    assert listed == make_targets() - {"force"}


# ------------------------------------------------------------------------------------------------- imports


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
@pytest.mark.parametrize("order", ["kernels, transformers", "transformers, kernels"])
def test_transformers_works_beside_our_kernels(order):
    script = f"""
import {order}, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
assert Path(kernels.__file__).parent == Path("kernels").resolve(), kernels.__file__
config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1)
logits = LlamaForCausalLM(config)(torch.arange(5)[None]).logits
assert logits.shape == (1, 5, 32) and logits.isfinite().all()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_know_nothing_of_lab_timing_files_or_plots(path):
    assert not imported(path) & {
        "lab",
        "tests",
        "time",
        "pandas",
        "matplotlib",
        "seaborn",
        "csv",
        "papermill",
    }


# --------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file that is, or by `git add .` would be, under version control."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git lists no files here: {done.stderr.strip()}")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_large(files):
    large = {str(path.relative_to(ROOT)): path.stat().st_size for path in files}
    limits = {".safetensors": LARGEST_WEIGHTS, ".csv": LARGEST_RECORD}
    assert not {name: size for name, size in large.items() if size > limits.get(Path(name).suffix, LARGEST_FILE)}


def test_no_file_names_a_path_of_someones_machine(files):
    found = {}
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        if match := MACHINE_PATH.search(text):
            found[str(path.relative_to(ROOT))] = match.group(0)
    assert not found


def test_what_runs_leave_behind_is_ignored(files):
    ignored = ("build/", ".venv/", ".pytest_cache/", ".ruff_cache/", ".ipynb_checkpoints/")
    names = [str(path.relative_to(ROOT)) for path in files]
    assert not [name for name in names if any(part in f"{name}/" for part in ignored) or name.endswith(".tmp")]
