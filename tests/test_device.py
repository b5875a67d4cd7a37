"""What a record says of the code that made it."""

import json
import subprocess
from pathlib import Path

import pytest

from lab import device

commit = device.commit.__wrapped__  # as it is before it remembers
LESSON = {
    "cells": [{"cell_type": "code", "source": ["x = 1"], "outputs": []}, {"cell_type": "markdown", "source": []}]
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a kernel and a lesson, committed; ``device.commit`` asks about it."""
    monkeypatch.delenv("LAB_COMMIT", raising=False)
    monkeypatch.setattr(device, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "kernels" / "norm.py").write_text("x = 1\n")
    (tmp_path / "notebooks" / "00_lesson.ipynb").write_text(json.dumps(LESSON))
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_the_commit_is_heads(checkout):
    assert commit() == git(checkout, "rev-parse", "--short=12", "HEAD")


@pytest.mark.parametrize("name", ["kernels/norm.py", "kernels/new.py"])
def test_changed_code_is_marked(checkout, name):
    (checkout / name).write_text("x = 2\n")
    assert commit().endswith("+dirty")


@pytest.mark.parametrize(("part", "marked"), [("source", True), ("outputs", False)])
def test_of_a_lesson_the_code_counts_and_not_what_came_of_it(checkout, part, marked):
    """Recording rewrites outputs, and the lesson after it still runs the code of the commit."""
    changed = json.loads(json.dumps(LESSON))
    changed["cells"][0][part] = ["x = 2"]
    (checkout / "notebooks" / "00_lesson.ipynb").write_text(json.dumps(changed))
    assert commit().endswith("+dirty") == marked


def test_a_repository_around_an_unpacked_archive_is_not_asked(checkout, monkeypatch):
    (checkout / "archive").mkdir()
    monkeypatch.setattr(device, "ROOT", checkout / "archive")
    assert commit() == "unknown"


def test_without_a_repository_the_commit_is_unknown_or_given(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "ROOT", tmp_path)
    monkeypatch.delenv("LAB_COMMIT", raising=False)
    assert commit() == "unknown"
    monkeypatch.setenv("LAB_COMMIT", "0a1b2c")
    assert commit() == "0a1b2c"
