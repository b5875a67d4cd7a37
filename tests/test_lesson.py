"""The machine, its presets, and the few helpers that every lesson uses."""

import pytest
import torch

import lab.lesson
from kernels.norm import rms_norm, tree_sum
from lab import exercise, show_source, start, timing
from lab.device import PRESETS, ROOT, Device, current_device, resolve_preset, slugify

GPU = Device("NVIDIA L4", "nvidia-l4", "1", "2", "3", (8, 9), 58, 48 << 20, 24 << 30)
CPU = Device("CPU", "cpu", "none", "2", "3", None, 0, 0, 0)


def test_a_gpu_is_a_folder_name():
    assert slugify("NVIDIA H200") == "nvidia-h200"
    assert slugify("NVIDIA GeForce RTX 4090 (Laptop)") == "nvidia-geforce-rtx-4090-laptop"


def test_auto_measures_where_it_can():
    assert resolve_preset("auto", GPU) is PRESETS["full"]
    assert resolve_preset("auto", CPU) is PRESETS["quick"]
    assert resolve_preset("quick", GPU) is PRESETS["quick"]


def test_presets_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"'auto', 'quick', 'full'.*preset='fast'"):
        resolve_preset("fast", GPU)
    with pytest.raises(ValueError, match="preset='full'"):
        resolve_preset("full", CPU)


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_on_a_gpu_only_the_full_preset_writes_records(monkeypatch, preset):
    monkeypatch.setattr(lab.lesson, "current_device", lambda: GPU)
    here = start(preset)
    base = ROOT if preset == "full" else ROOT / "build" / "quick"
    assert here.store.folder == base / "data" / "nvidia-l4"
    assert here.figures == base / "figures" / "nvidia-l4"
    assert here.dtype == torch.bfloat16
    assert "**Running on NVIDIA L4**" in here.banner


def test_without_a_gpu_the_recorded_one_is_shown_read_only(monkeypatch):
    monkeypatch.setattr(lab.lesson, "current_device", lambda: CPU)
    here = start()
    assert here.store.folder == ROOT / "data" / "nvidia-h200"
    assert here.dtype == torch.float16
    assert "No GPU here" in here.banner
    with pytest.raises(ValueError, match="open for reading only"):
        here.record("tests", [{"suite": "all", "passed": 1, "failed": 0, "skipped": 0}])


def test_the_device_names_what_a_record_needs():
    device = current_device()
    assert device.is_gpu == torch.cuda.is_available()
    assert device.torch == torch.__version__.split("+")[0]


def solved():
    return 1


def unsolved():
    raise NotImplementedError


@pytest.mark.parametrize(
    ("solution", "want", "verdict"),
    [
        (solved, 1, "`solved`: passed"),
        (solved, 2, "`solved`: not right yet. got 1"),
        (unsolved, 1, "`unsolved`: not solved yet"),
    ],
)
def test_an_exercise_says_how_it_went(monkeypatch, solution, want, verdict):
    shown = []
    monkeypatch.setattr(lab.lesson, "display", lambda markdown: shown.append(markdown.data))

    def check(fn):
        got = fn()
        assert got == want, f"got {got}"

    exercise(solution, check)
    assert shown[0].startswith(verdict)


def test_progress_is_one_line_and_only_on_a_gpu(monkeypatch, capsys):
    for device, said in ((GPU, "copy: 3 of 3 points, 00:00"), (CPU, "")):
        monkeypatch.setattr(lab.lesson, "current_device", lambda device=device: device)
        assert list(start("quick").progress(range(3), "copy")) == [0, 1, 2]
        assert capsys.readouterr().out.strip().split("\r")[-1].strip() == said


def test_a_kernel_shows_its_own_source():
    assert "\ndef rms_norm(" in show_source(rms_norm).data
    assert "\n@triton.jit\ndef tree_sum(" in show_source(tree_sum).data


def test_a_wrong_result_is_not_accurate():
    reference = torch.ones(4)
    assert timing.check_accuracy("fine", torch.ones(4).half(), reference) == 0
    for wrong in (torch.full((4,), 1.01), torch.full((4,), float("nan"))):
        with pytest.raises(ValueError, match="some kernel: relative error"):
            timing.check_accuracy("some kernel", wrong.half(), reference)


def test_a_ring_is_larger_than_l2_and_bounded():
    assert timing.ring_size(GPU.l2_bytes * 4, GPU) == 2
    assert timing.ring_size(1 << 20, GPU) * (1 << 20) > 2 * GPU.l2_bytes
    assert timing.ring_size(1, GPU) == timing.RING_CALLS
