"""The lessons as notebooks: their structure, their committed outputs, and that their folded answers pass."""

from __future__ import annotations

import ast
import copy
import re
from collections import defaultdict
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from lab import run
from lab.device import ROOT

LONGEST_CELL = 40  # lines
LESSONS = run.find_lessons(ROOT / "notebooks")
FOLDED = re.compile(r"<details>\s*<summary>Answer</summary>.*?```python\n(.*?)```.*?</details>", re.S)

each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_lessons_are_numbered_from_zero_without_gaps():
    assert LESSONS
    assert [lesson.name[:3] for lesson in LESSONS] == [f"{number:02}_" for number in range(len(LESSONS))]


def test_every_notebook_is_a_numbered_lesson():
    assert sorted((ROOT / "notebooks").glob("*.ipynb")) == [lesson.path for lesson in LESSONS]


# -------------------------------------------------------------------------------------------------- structure


@each_lesson
def test_it_is_a_valid_notebook_that_opens_with_one_title(lesson):
    notebook = lesson.read()
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    titles = [line for line in markdown_lines(notebook) if line.startswith("# ")]
    assert len(titles) == 1


def markdown_lines(notebook: NotebookNode) -> list[str]:
    """The lines of every text cell, outside code blocks."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M).splitlines()


@each_lesson
def test_its_first_code_cell_declares_literal_parameters(lesson):
    notebook = lesson.read()
    cells = code_cells(notebook)
    assert [cell for cell in cells if "parameters" in run.tags(cell)] == cells[:1]
    for statement in ast.parse(cells[0].source).body:
        assert isinstance(statement, ast.AnnAssign), f"no type hint: {ast.unparse(statement)}"
    for line in cells[0].source.splitlines():
        assert re.search(r"# \w", line), f"does not say what it is for: {line}"
    parameters = lesson.parameters()
    assert parameters["preset"].default == "auto"
    for parameter in parameters.values():
        assert type(parameter.default) is parameter.type


@each_lesson
def test_no_code_cell_is_long(lesson):
    lengths = {cell.source.splitlines()[0]: len(cell.source.splitlines()) for cell in code_cells(lesson.read())}
    assert not {first: length for first, length in lengths.items() if length > LONGEST_CELL}


def test_no_code_is_pasted_from_lesson_to_lesson():
    seen = defaultdict(set)
    for lesson in LESSONS:
        for source in after_setup(lesson.read()):
            seen[source].add(lesson.name)
    pasted = {source: names for source, names in seen.items() if len(names) > 1}
    assert not pasted


def after_setup(notebook: NotebookNode) -> list[str]:
    """The code behind the cells that open every lesson: its parameters, and the imports and `lab.start`."""
    sources = [cell.source.strip() for cell in code_cells(notebook)]
    opening = next((at for at, source in enumerate(sources) if "start(preset" in source), 0)
    return sources[opening + 1 :]


@each_lesson
def test_the_interpreter_is_chosen_before_triton_is_imported(lesson):
    """Triton's own functions are made for the GPU or for the interpreter when it is imported.

    ``lab.run`` hands the choice down to its lessons; JupyterLab and plain papermill do not.
    """
    cells = [cell.source for cell in code_cells(lesson.read())]
    imported = [name for source in cells for name in imports(source) if name in ("triton", "kernels", "lab")]
    assert imported[0] != "triton", "import lab or kernels before triton"


def imports(source: str) -> list[str]:
    """The packages that a cell imports, in order."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(str(node.module).split(".")[0])
    return names


# ----------------------------------------------------------------------------------------- what is committed


@each_lesson
def test_committed_outputs_are_those_of_one_run_from_top_to_bottom(lesson):
    cells = code_cells(lesson.read())
    counts = [cell.execution_count for cell in cells]
    if any(cell.outputs for cell in cells):
        assert counts == list(range(1, len(cells) + 1))
    else:
        assert counts == [None] * len(cells), "counts without outputs"


@each_lesson
def test_committed_outputs_hold_no_error_and_no_warning(lesson):
    for cell in code_cells(lesson.read()):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", f"{cell.source}\n{output.get('text')}"


@each_lesson
def test_no_metadata_of_a_run_or_an_editor_is_left(lesson):
    notebook = lesson.read()
    assert notebook.metadata == run.NOTEBOOK_METADATA
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.source
        for output in cell.get("outputs", []):
            assert not set(output.get("metadata", {})) - set(output.get("data", {})), cell.source


# -------------------------------------------------------------------------------------------------- exercises


def exercises(notebook: NotebookNode) -> list[list[NotebookNode]]:
    """Each exercise as [stub, check, answer]: its tagged code cells, and the cell that folds the answer."""
    groups: list[list[NotebookNode]] = []
    for cell in notebook.cells:
        if "exercise" in run.tags(cell):
            groups.append([cell])
        elif groups and ("check" in run.tags(cell) or "<details>" in cell.source):
            groups[-1].append(cell)
    return groups


@each_lesson
def test_every_exercise_is_a_stub_a_check_and_a_folded_answer(lesson):
    notebook = lesson.read()
    groups = exercises(notebook)
    assert groups, "a lesson ends with an exercise"
    for group in groups:
        assert len(group) == 3, f"needs one stub, one check, one answer: {group[0].source}"
        stub, check, answer = group
        at = notebook.cells.index(stub)
        assert notebook.cells[at - 1].cell_type == "markdown", "the specification stands above the stub"
        assert "raise NotImplementedError" in stub.source
        assert "check" in run.tags(check)
        (call,) = ast.parse(check.source).body
        assert ast.unparse(call.value.func).endswith("exercise")
        assert names_defined(stub.source) & names_used(check.source)
        (solution,) = FOLDED.findall(answer.source)
        assert names_defined(stub.source) <= names_defined(solution)
        assert "NotImplementedError" not in solution


def names_defined(source: str) -> set[str]:
    return {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def names_used(source: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def verdicts(notebook: NotebookNode) -> list[str]:
    """What each check cell of an executed lesson said."""
    return [said(cell) for cell in notebook.cells if "check" in run.tags(cell)]


def said(cell: NotebookNode) -> str:
    texts = [output.get("text", "") or output.get("data", {}).get("text/markdown", "") for output in cell.outputs]
    return " ".join(texts).strip()


@each_lesson
def test_committed_exercises_are_not_solved(lesson):
    notebook = lesson.read()
    if not any(cell.outputs for cell in code_cells(notebook)):
        pytest.skip("committed without outputs")
    for verdict in verdicts(notebook):
        assert "not solved yet" in verdict


@each_lesson
def test_the_folded_answers_pass_their_checks(lesson, tmp_path: Path):
    notebook = copy.deepcopy(lesson.read())
    groups = exercises(notebook)
    for stub, _, answer in groups:
        stub.source = FOLDED.findall(answer.source)[0]
    solved = run.Lesson(tmp_path / lesson.path.name)
    nbformat.write(notebook, solved.path)
    executed = tmp_path / "executed.ipynb"
    result = run.run_lesson(solved, executed, {"preset": "quick"}, timeout=300)
    assert result.outcome == "ok", result.fault
    found = verdicts(nbformat.read(executed, as_version=4))
    assert len(found) == len(groups)
    for verdict in found:
        assert re.search(r"\bpassed\b", verdict) and "not " not in verdict, verdict
