"""Runs the lessons headless, on papermill: ``python -m lab.run [lesson ...] [--preset quick] [-p seed=1]``.

Everything that can be refused is refused before the first cell runs: a lesson or parameter that does not
exist, a value of the wrong type, ``--record`` without a GPU. After that every lesson runs, whatever happened
to the one before it, and the exit status says whether all of them succeeded:

0 all succeeded; 1 at least one failed; 2 the command line was refused; 130 interrupted.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import papermill
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm
from traitlets import default

from lab.device import ROOT, current_device, resolve_preset
from lab.records import write_atomically

NOTEBOOKS = ROOT / "notebooks"
EXECUTED = ROOT / "build" / "run"
CELL_SECONDS = 600

# A path in someone's home or scratch space. Committed outputs must hold none.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|Users|work|tmp)/[\w.-]+")


class Refused(ValueError):
    """The command line asks for something that does not exist or cannot be; nothing was run."""


# ------------------------------------------------------------------------------ lessons and their parameters


@dataclass(frozen=True)
class Parameter:
    """One line of a lesson's parameters cell: its name, default value and the type a value must have."""

    name: str
    default: Any
    type: type

    def parse(self, text: str) -> Any:
        """The value that `text`, typed on a command line, stands for; Refused if it is of another type."""
        value: Any = text
        if self.type is bool:
            value = {"true": True, "false": False}.get(text.lower(), text)
        elif self.type is not str:
            with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                value = ast.literal_eval(text)
            if self.type is float and type(value) is int:
                value = float(value)
        if type(value) is not self.type or not self._items_fit(value):
            raise Refused(f"-p {self.name}={text}: should be {self._wanted()}, as its default {self.default!r} is")
        return value

    def _items_fit(self, value: Any) -> bool:
        if self.type not in (list, tuple) or not self.default:
            return True
        allowed = {type(item) for item in self.default}
        return all(type(item) in allowed for item in value)

    def _wanted(self) -> str:
        if self.type not in (list, tuple) or not self.default:
            return self.type.__name__
        items = " or ".join(sorted({type(item).__name__ for item in self.default}))
        return f"{self.type.__name__} of {items}"


@dataclass(frozen=True)
class Lesson:
    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    def read(self) -> NotebookNode:
        """The notebook; Refused if the file is not one."""
        try:
            return nbformat.read(self.path, as_version=4)
        except Exception as error:  # nbformat raises several unrelated types for a broken file
            raise Refused(f"{self.path.name} is not a readable notebook: {error}") from error

    def parameters(self) -> dict[str, Parameter]:
        """What the cell tagged `parameters` declares, by name."""
        source = "\n".join(cell.source for cell in self.read().cells if "parameters" in tags(cell))
        declared = {}
        for statement in ast.parse(source).body:
            if isinstance(statement, ast.AnnAssign) and statement.value is not None:
                target, hint = statement.target, ast.unparse(statement.annotation)
            elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                target, hint = statement.targets[0], ""
            else:
                continue
            try:
                value = ast.literal_eval(statement.value)
            except ValueError as error:
                where = f"{self.path.name}, parameters cell"
                raise Refused(f"{where}: `{ast.unparse(statement)}` is not a literal") from error
            # The hint wins: `scale: float = 1` takes 0.5.
            kind = {"bool": bool, "int": int, "float": float, "str": str}.get(hint, type(value))
            declared[target.id] = Parameter(target.id, value, kind)
        return declared


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def find_lessons(folder: Path) -> list[Lesson]:
    """Every numbered notebook in `folder`, in reading order."""
    return [Lesson(path) for path in sorted(folder.glob("[0-9]*.ipynb"))]


def select(lessons: Sequence[Lesson], wanted: Sequence[str]) -> list[Lesson]:
    """The lessons named by stem, file name or unique beginning ("02"), in reading order; all by default."""
    chosen = set()
    for word in wanted:
        stem = Path(word).name.removesuffix(".ipynb")
        exact = [lesson for lesson in lessons if lesson.name == stem]
        matches = exact or [lesson for lesson in lessons if stem and lesson.name.startswith(stem)]
        if len(matches) != 1:
            fault = "fits several lessons" if matches else "is no lesson"
            names = ", ".join(lesson.name for lesson in matches or lessons) or "none"
            raise Refused(f"lesson = {word!r} {fault}; there are: {names}")
        chosen.add(matches[0])
    return [lesson for lesson in lessons if not wanted or lesson in chosen]


def parse_parameters(lessons: Iterable[Lesson], assignments: Sequence[str]) -> dict[str, Any]:
    """Values for `name=value` words, typed as declared; every lesson must declare every name."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise Refused(f"-p {assignment}: should be name=value")
        if name in values:
            raise Refused(f"-p {name} is given twice")
        for lesson in lessons:
            declared = lesson.parameters()
            if name not in declared:
                known = ", ".join(declared) or "none"
                raise Refused(f"-p {name}: {lesson.name} declares no such parameter; it declares: {known}")
            values[name] = declared[name].parse(text)
    return values


# ------------------------------------------------------------------------------------------- running a lesson


def this_python(environment: dict[str, str]) -> type[AsyncKernelManager]:
    """A kernel manager that starts this interpreter, whichever kernels are installed or not."""

    class Specs(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            quietly = "--log-level=CRITICAL"  # else each start warns of loopback, each stop of an interrupt
            argv = [*make_ipkernel_cmd(), quietly]
            return KernelSpec(argv=argv, display_name="Python 3", language="python", env=environment)

    class ThisPython(AsyncKernelManager):
        @default("kernel_spec_manager")
        def _specs(self) -> KernelSpecManager:
            return Specs(parent=self)

    return ThisPython


def kernel_environment(commit: str | None = None) -> dict[str, str]:
    """What the lessons' process gets on top of this one's environment."""
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([inherited] if inherited else [])]),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # a shell's Agg would swallow the charts
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the debugger's warning lands in the lessons' outputs
    }
    if commit:
        environment["LAB_COMMIT"] = commit
    return environment


@dataclass
class Result:
    """What became of one lesson. `outcome` is ok, recorded, failed, interrupted or not run."""

    lesson: Lesson
    outcome: str = "not run"
    seconds: float = 0.0
    charts: list[str] = field(default_factory=list)
    fault: str = ""  # for a failed lesson: where, what, and the executed copy

    @property
    def succeeded(self) -> bool:
        return self.outcome in ("ok", "recorded")

    @property
    def line(self) -> str:
        drawn = f"{len(self.charts)} chart{'s' * (len(self.charts) != 1)}"
        return f"{self.lesson.name}: {self.outcome}, {self.seconds:.1f} s, {drawn}"


def run_lesson(
    lesson: Lesson,
    executed: Path,
    parameters: dict[str, Any],
    *,
    timeout: int = CELL_SECONDS,
    commit: str | None = None,
    progress: bool | dict[str, Any] = False,
) -> Result:
    """Runs one lesson in a fresh process, from the repository root; the executed copy stays in `executed`.

    A failing or overlong cell, a dead kernel and a broken notebook come back as a failed Result;
    KeyboardInterrupt passes through.
    """
    result = Result(lesson)
    before = chart_times()
    started = time.perf_counter()
    try:
        executed.parent.mkdir(parents=True, exist_ok=True)
        executed.unlink(missing_ok=True)  # a copy of an earlier run must not stand in for this one's
        papermill.execute_notebook(
            str(lesson.path.resolve()),
            str(executed.resolve()),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            cwd=str(ROOT),
            progress_bar=progress,
            execution_timeout=timeout,
            kernel_manager_class=this_python(kernel_environment(commit)),
            coalesce_streams=True,
        )
        result.outcome = "ok"
    except Exception as error:  # whatever it was, the lessons after this one still run
        result.outcome = "failed"
        result.fault = describe(error, executed, timeout)
    finally:
        result.seconds = time.perf_counter() - started
        result.charts = sorted(name for name, at in chart_times().items() if before.get(name) != at)
    return result


def chart_times() -> dict[str, int]:
    """When each chart was last written, in nanoseconds, by its path without suffix: SVG and PNG are one."""
    recorded = (ROOT / "figures").rglob("*.svg")
    quick = (ROOT / "build").glob("**/figures/**/*.svg")
    return {str(path.with_suffix("")): path.stat().st_mtime_ns for path in (*recorded, *quick)}


def describe(error: Exception, executed: Path, timeout: int) -> str:
    """What went wrong, in which cell, and where to look at it."""
    if isinstance(error, PapermillExecutionError):
        what = f"{error.ename}: {error.evalue}"
    elif isinstance(error, CellTimeoutError):
        what = f"a cell took longer than {timeout} s (--timeout)"
    elif isinstance(error, DeadKernelError):
        what = "the lesson's process died"
    else:
        what = f"{type(error).__name__}: {error}"
    return f"{last_cell(executed)}: {what}\n    executed copy: {shown(executed)}"


def last_cell(executed: Path) -> str:
    """The last code cell that was started, by number and first line."""
    if not executed.exists():
        return "before the first cell"
    cells = [
        cell
        for cell in nbformat.read(executed, as_version=4).cells
        if cell.cell_type == "code" and "injected-parameters" not in tags(cell)
    ]
    begun = [n for n, cell in enumerate(cells, 1) if cell.metadata.get("papermill", {}).get("start_time")]
    if not begun:
        return "before the first cell"
    first_line = next(iter(cells[begun[-1] - 1].source.splitlines()), "")
    return f"code cell {begun[-1]} ({first_line})"


def shown(path: Path) -> str:
    """`path` as a reader in the repository would write it."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


# ---------------------------------------------------------------------------------------- recording a lesson

NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def record(lesson: Lesson, executed: Path) -> None:
    """Writes the executed outputs back into the lesson, cleaned, as one atomic replacement.

    ValueError if an output names a path of this machine that cleaning does not know how to shorten.
    """
    notebook = cleaned(lesson.read(), nbformat.read(executed, as_version=4))
    text = nbformat.writes(notebook) + "\n"
    if found := MACHINE_PATH.search(text):
        raise ValueError(f"an output names a path of this machine: {found.group(0)}")
    write_atomically(lesson.path, text)


def cleaned(source: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """`source` with the outputs of `executed`, numbered from 1, and nothing else of that run."""
    notebook = copy.deepcopy(source)
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    ran = [
        cell for cell in executed.cells if not {"injected-parameters", "papermill-error-cell-tag"} & set(tags(cell))
    ]
    if [cell.source for cell in ran] != [cell.source for cell in notebook.cells]:
        raise ValueError("the lesson was edited while it ran")
    count = 0
    for cell, done in zip(notebook.cells, ran, strict=True):
        cell.metadata = nbformat.from_dict({"tags": tags(cell)} if tags(cell) else {})
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = [clean_output(output, count) for output in done.outputs]
    return notebook


def clean_output(output: NotebookNode, count: int) -> NotebookNode:
    output = copy.deepcopy(output)
    if "execution_count" in output:
        output.execution_count = count
    if "text" in output:
        output.text = without_paths(output.text)
    for kind, content in output.get("data", {}).items():
        if isinstance(content, str) and not kind.startswith("image/"):
            output.data[kind] = without_paths(content)
    return output


def without_paths(text: str) -> str:
    """`text` with the places of this machine named relative to the repository, the Python or the home."""
    text = re.sub(re.escape(tempfile.gettempdir()) + r"/ipykernel_\d+/\d+\.py", "<cell>", text)
    for place, name in ((ROOT, "."), (Path(sys.prefix), "<python>"), (Path.home(), "~")):
        if place != Path(place.anchor):  # a container's home may be / itself
            text = re.sub(re.escape(str(place)) + r"(?![\w-])", name, text)
    return text


# ---------------------------------------------------------------------------------------------- command line


def summary(results: Sequence[Result]) -> str:
    """A table of what became of every lesson, and below it the fault of each that failed."""
    width = max([len("lesson"), *(len(result.lesson.name) for result in results)])
    lines = [f"{'lesson':<{width}}  {'seconds':>7}  {'charts':>6}  outcome"]
    lines += [
        f"{result.lesson.name:<{width}}  {result.seconds:>7.1f}  {len(result.charts):>6}  {result.outcome}"
        for result in results
    ]
    lines += [f"\n{result.lesson.name}, {result.fault}" for result in results if result.fault]
    return "\n".join(lines)


def listing(lessons: Sequence[Lesson]) -> str:
    """Every lesson and the parameters that it declares."""
    lines = []
    for lesson in lessons:
        lines.append(lesson.name)
        lines += [f"    {p.name}: {p.type.__name__} = {p.default!r}" for p in lesson.parameters().values()]
    return "\n".join(lines)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab.run", description="Run the lessons headless.")
    parser.add_argument("lessons", nargs="*", metavar="lesson", help="name or its beginning, such as 02; all if none")
    parser.add_argument("--preset", help="auto, quick or full; passed to the lessons as their parameter `preset`")
    parser.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="name=value",
        help="set a lesson's parameter",
    )
    parser.add_argument(
        "--out", type=Path, default=EXECUTED, metavar="DIR", help=f"executed copies ({shown(EXECUTED)})"
    )
    parser.add_argument(
        "--timeout",
        type=int,
        default=CELL_SECONDS,
        metavar="S",
        help=f"seconds a cell may take ({CELL_SECONDS})",
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the cleaned outputs back into notebooks/ (GPU, full preset)",
    )
    parser.add_argument("--commit", metavar="SHA", help="the commit to name in records, where git cannot tell")
    parser.add_argument("--list", action="store_true", help="list the lessons and their parameters, run nothing")
    return parser


def check_preset(values: dict[str, Any], recording: bool) -> None:
    """Refused if the preset does not exist or needs a GPU that is not there."""
    device = current_device()
    if recording and not device.is_gpu:
        raise Refused(f"--record needs a GPU; this is {device.name}")
    if recording and set(values) - {"preset"}:
        raise Refused("--record takes no -p: committed outputs are those of the parameters that the lesson shows")
    try:
        preset = resolve_preset(values.get("preset", "auto"), device)
    except ValueError as error:
        raise Refused(str(error)) from error
    if recording and preset.name != "full":
        raise Refused(f"--record needs the full preset; preset = {preset.name!r}")


def check_out(out: Path, notebooks: Path) -> None:
    """Refused if executed copies cannot be written to `out`, or would take the place of the lessons."""
    if out.resolve() == notebooks.resolve():
        raise Refused(f"--out {out}: the lessons themselves are there")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise Refused(f"--out {out}: {error.strerror}") from error


def run_all(
    lessons: Sequence[Lesson], out: Path, values: dict[str, Any], options: argparse.Namespace
) -> tuple[list[Result], bool]:
    """Runs every lesson; the results, and whether Ctrl-C cut the run short."""
    results = [Result(lesson) for lesson in lessons]
    watched = sys.stderr.isatty()
    with tqdm(total=len(lessons), unit="lesson", desc="lessons", disable=not watched, position=0) as overall:
        for at, lesson in enumerate(lessons):
            executed = out / lesson.path.name
            bar = {"position": 1, "leave": False, "desc": lesson.name} if watched else False
            started = time.perf_counter()
            try:
                results[at] = run_lesson(
                    lesson, executed, values, timeout=options.timeout, commit=options.commit, progress=bar
                )
                if options.record and results[at].succeeded:
                    keep(results[at], executed)
            except KeyboardInterrupt:
                results[at].outcome = "interrupted"
                results[at].seconds = time.perf_counter() - started
                return results, True
            tqdm.write(f"[{at + 1}/{len(lessons)}] {results[at].line}")
            sys.stdout.flush()
            overall.update()
    return results, False


def keep(result: Result, executed: Path) -> None:
    """Records a lesson that succeeded, and says so in its result."""
    try:
        record(result.lesson, executed)
        result.outcome = "recorded"
    except (ValueError, OSError) as error:
        result.outcome = "failed"
        result.fault = f"ran, but was not recorded: {error}\n    executed copy: {shown(executed)}"


def main(arguments: Sequence[str] | None = None, notebooks: Path = NOTEBOOKS) -> int:
    parser = command_line()
    options = parser.parse_args(arguments)
    lessons = find_lessons(notebooks)
    try:
        chosen = select(lessons, options.lessons)
        if options.list:
            print(listing(chosen))
            return 0
        if not chosen:
            raise Refused(f"there is no lesson in {shown(notebooks)}")
        if options.timeout <= 0:
            raise Refused(f"--timeout {options.timeout}: should be above 0")
        preset = [f"preset={options.preset}"] if options.preset else []
        values = parse_parameters(chosen, preset + options.parameters)
        check_preset(values, options.record)
        check_out(options.out, notebooks)  # last: it makes the folder
    except Refused as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    results, interrupted = run_all(chosen, options.out, values, options)
    print(f"\n{summary(results)}")
    if interrupted:
        return 130
    return 0 if all(result.succeeded for result in results) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's Ctrl-C: the summary is still printed
    sys.exit(main())
