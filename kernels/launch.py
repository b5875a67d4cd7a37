"""What the host does for a launch, and how it gets around doing it twice.

A launch needs more of the host than of the GPU when tokens are few: checking operands, choosing a schedule, matching
arguments to a compiled kernel take tens of microseconds, and a decode step has hundreds of launches. All of it
depends on the operands' *form* (shapes, strides, dtypes, alignment), not on what they hold or where they lie. So an
operator marked with ``remembers`` is watched the first time it meets a form: which compiled kernels it launched, and
which of its operands, results and scratch went where. The next time the same launches are made with the new
addresses, and nothing else. Operands, schedule and kernel are the same, and so are the bits.

A CUDA graph saves more still, but only where shapes *and addresses* stay. This is for everything else.

The GPU has work of its own at a launch: programs must be placed, and begin with barriers and descriptors to set up,
before the first byte is asked for. From Hopper on all that may happen while the launch before is still finishing
("programmatic dependent launch"), if the kernel itself waits before it looks at memory: see
``wait_for_previous_launch``. Earlier still, if the launch before says so: see ``let_next_launch_in``.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq
from triton.runtime import driver

# --------------------------------------------------------------------------------------------- remembering


@dataclass
class _Recording:
    """What a watched operator has launched, and the scratch and counters it asked for."""

    launches: list = field(default_factory=list)
    scratch: list[torch.Tensor] = field(default_factory=list)
    counters: list[torch.Tensor] = field(default_factory=list)


class _Overlap(threading.local):
    """Whether this thread's launches may be set up before the one ahead of them has ended."""

    allowed: bool = True


class _Watching(threading.local):
    """The recording of the operator that this thread watches; ``None`` if it watches none."""

    recording: _Recording | None = None


_overlap = _Overlap()
_watching = _Watching()
_forms: list[dict] = []
MOST_FORMS = 4096
"""Forms that an operator remembers at most; a server that has seen more starts again."""

COMPILED = torch.cuda.is_available() and not knobs.runtime.interpret
"""Whether there is anything to remember: Triton's interpreter compiles nothing."""


INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def wait_for_previous_launch():
    """Wait until every launch before this one has ended and what it wrote can be read.

    A kernel that is launched by ``launch`` calls this before it reads or writes global memory, or it would run beside
    the one that makes its inputs. What needs no memory, setting up barriers say, belongs before it, and
    ``fetch_into_l2`` may come before it. To GPUs before Hopper, and after an ordinary launch, it is nothing.

    Source: "Programmatic Dependent Launch and Synchronization" in Nvidia's CUDA C++ Programming Guide.
    """
    if not INTERPRETED and cuda_capability_geq(9, 0):
        gdc_wait()


@triton.jit
def let_next_launch_in():
    """Allow the programs of the next launch on SMs that have room for them while this launch still runs.

    They are placed when all programs of this launch have called this, or have ended, and then wait in
    ``wait_for_previous_launch`` for its end. Without it they are placed at the end, all at once and in order.

    Source: as for ``wait_for_previous_launch``.
    """
    if not INTERPRETED and cuda_capability_geq(9, 0):
        gdc_launch_dependents()


FETCH_INTO_L2 = tl.constexpr("""
    {
        .reg .pred some;
        setp.gt.s32 some, $2, 0;
        @some cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
    }
""")


@triton.jit
def fetch_into_l2(pointers, sizes):
    """Ask memory for ``sizes`` bytes at each of ``pointers``, multiples of 16, and do not wait for them.

    The one thing that may be asked of memory ahead of ``wait_for_previous_launch``: it reads nothing. A byte that
    the launch before writes after that is written to L2, too, and found there.

    Source: ``cp.async.bulk.prefetch`` in Nvidia's "PTX ISA".
    """
    if not INTERPRETED and cuda_capability_geq(9, 0):
        addresses = pointers.to(tl.int64, bitcast=True)
        tl.inline_asm_elementwise(FETCH_INTO_L2, "=r,l,r", [addresses, sizes], dtype=tl.int32, is_pure=False, pack=1)


def launch(kernel, grid: tuple[int, ...], *args, **constants):
    """``kernel[grid](*args, **constants)``, watched, and placed on the GPU before the launch ahead of it has ended.

    Returns the compiled kernel. ``kernel`` must call ``wait_for_previous_launch`` first.
    """
    if COMPILED and _overlap.allowed and cuda_capability_geq(9, 0):
        constants["launch_pdl"] = True
    compiled = kernel[grid](*args, **constants)
    if _watching.recording is not None:
        _watching.recording.launches.append((kernel, compiled, grid, args, constants))
    return compiled


@contextmanager
def launches_apart() -> Iterator[None]:
    """Launches made or captured within are not set up before the one ahead has ended: to see what that gains."""
    before, _overlap.allowed = _overlap.allowed, False
    try:
        yield
    finally:
        _overlap.allowed = before


def scratch(size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``(size,)`` for a launch to use, and nobody afterwards. Holds anything."""
    made = torch.empty(size, dtype=dtype, device=device)
    if _watching.recording is not None:
        _watching.recording.scratch.append(made)
    return made


class _Launch(NamedTuple):
    """A launch but for its addresses: what ``run`` takes, and where among ``values`` which address belongs.

    ``addresses`` are pairs of a place among the values and the number of an address; ``descriptors`` are places, the
    class and the fields of a TMA descriptor, and the number of the address it describes.
    """

    run: Callable
    grid: tuple[int, int, int]
    function: object
    metadata: object
    values: list
    addresses: list[tuple[int, int]]
    descriptors: list[tuple[int, type, dict, int]]


class _Recipe:
    """The launches of one operator for one form of operands.

    ``made`` are shapes, strides and dtypes of the tensors it allocates; it returns the first ``results`` of them.
    A launch's addresses are numbered: operands first, then what is made, then counters.
    """

    def __init__(self, recording: _Recording, operands: list[torch.Tensor], result: object):
        """
        Raises:
            ValueError: a launch used a tensor that is none of the operands, results and scratch.
        """
        results = result if isinstance(result, tuple) else (result,)
        fresh = [*results, *recording.scratch]
        if not all(isinstance(x, torch.Tensor) and x.is_contiguous() for x in fresh) or not recording.launches:
            raise ValueError("results must be tensors without gaps, and come from a launch")
        self.device = results[0].device
        self.made = [(tuple(x.shape), x.stride(), x.dtype) for x in fresh]
        self.single, self.results = not isinstance(result, tuple), len(results)
        self.counters = [len(x) for x in recording.counters]
        known = {x.data_ptr(): at for at, x in reversed([*enumerate([*operands, *fresh, *recording.counters])])}
        if {x.data_ptr() for x in operands} & {x.data_ptr() for x in fresh}:
            raise ValueError("a result is an operand")
        self.launches = [self._bound(known, *entry) for entry in recording.launches]
        used = {source for one in self.launches for *_, source in (*one.addresses, *one.descriptors)}
        if not {known[x.data_ptr()] for x in results} <= used:
            raise ValueError("a result comes from no launch")

    @staticmethod
    def _bound(known: dict[int, int], kernel, compiled, grid, args, constants) -> _Launch:
        """A launch with its arguments in the order that the kernel names them; ``known`` numbers the addresses."""
        parameters = inspect.signature(kernel.fn).parameters
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        values = [named[name] if name in named else parameters[name].default for name in kernel.arg_names]
        addresses, descriptors = [], []
        for at, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                values[at] = None
                addresses.append((at, _source(known, value)))
            elif hasattr(value, "block_shape"):
                fields = {**vars(value), "base": None}  # must not keep the operand alive
                values[at] = None
                descriptors.append((at, type(value), fields, _source(known, value.base)))
        grid = (*grid, 1, 1)[:3]
        function, metadata = compiled.function, compiled.packed_metadata
        return _Launch(compiled.run, grid, function, metadata, values, addresses, descriptors)

    def __call__(self, device: int, addresses: list[int]):
        """Make the launches with operands at these addresses. ``None``, and nothing done, if counters are short."""
        counters = [finished_counters(count, self.device) for count in self.counters]
        if any(x is None for x in counters):
            return None
        fresh = [torch.empty_strided(*sizes, dtype=dtype, device=self.device) for *sizes, dtype in self.made]
        addresses += [x.data_ptr() for x in (*fresh, *counters)]
        stream = driver.active.get_current_stream(device)
        for run, grid, function, metadata, values, plain, descriptors in self.launches:
            values = values.copy()
            for at, source in plain:
                values[at] = addresses[source]
            for at, kind, fields, source in descriptors:
                described = object.__new__(kind)  # its checks were made the first time
                described.__dict__ = {**fields, "base": _Address(addresses[source])}
                values[at] = described
            run(*grid, stream, function, metadata, None, None, None, *values)
        return fresh[0] if self.single else tuple(fresh[: self.results])


class _Address:
    """What a descriptor needs of the tensor it describes."""

    __slots__ = ("address",)

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def _source(known: dict[int, int], x: torch.Tensor) -> int:
    if x.data_ptr() not in known:
        raise ValueError("a launch used a tensor that was made on the way")
    return known[x.data_ptr()]


def _form(args: tuple, kwargs: dict) -> tuple[tuple, list[torch.Tensor], list[int]]:
    """What the host's work depends on, the device first; the tensors among the arguments; their addresses.

    Addresses enter as alignment to 16 bytes, as which of them are the same, and nothing more.

    Raises:
        TypeError: an argument cannot be part of a key, or is one that the operator has to refuse.
    """
    key, tensors, addresses = [driver.active.get_current_device(), _overlap.allowed, *kwargs], [], []
    gradients = torch.is_grad_enabled()
    for x in (*args, *kwargs.values()):
        if isinstance(x, torch.Tensor):
            if gradients and x.requires_grad:
                raise TypeError("the operator refuses this")
            address = x.data_ptr()
            key += x.shape, x.stride(), x.dtype, x.get_device(), address % 16
            if address in addresses:
                key.append(addresses.index(address))
            tensors.append(x)
            addresses.append(address)
        else:
            key += x.__class__, x
    return tuple(key), tensors, addresses


def uncompiled(operator: Callable) -> Callable:
    """Mark an operator that ``torch.compile`` must not look into: it runs as it is, between two compiled graphs."""
    plain = []  # torch.compile's "leave this alone", made when first needed: it takes a second to import

    @functools.wraps(operator)
    def call(*args, **kwargs):
        if not torch.compiler.is_compiling():
            return operator(*args, **kwargs)
        plain[:] = plain or [torch.compiler.disable(operator)]
        return plain[0](*args, **kwargs)

    return call


def _profiled() -> bool:
    """Whether somebody wants to hear of every launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def remembers(operator: Callable | None = None, *, every_time: Callable | None = None) -> Callable:
    """Mark an operator whose host work depends on the form of its operands alone.

    It must launch through ``launch``, take scratch from ``scratch`` and ``finished_counters`` alone, and return the
    tensors that its kernels have filled. A call that works differently (copies an operand first, writes to ``out``,
    looks at values because ``validate`` says so) is not remembered, but made in full each time. Under
    ``torch.compile`` the operator runs as it is, between two compiled graphs.

    Args:
        every_time: called with the operator's arguments before launches are made from memory: a look at values that
            the operator itself takes too.
    """
    if operator is None:
        return functools.partial(remembers, every_time=every_time)
    known: dict[tuple, _Recipe | None] = {}
    validates = "validate" in inspect.signature(operator).parameters
    _forms.append(known)

    @uncompiled
    @functools.wraps(operator)
    def call(*args, **kwargs):
        if not COMPILED or _watching.recording is not None or kwargs.get("out") is not None:
            return operator(*args, **kwargs)
        if validates and kwargs.get("validate", True):
            return operator(*args, **kwargs)
        try:
            key, operands, addresses = _form(args, kwargs)
            recipe = known.get(key, operator)
        except TypeError:  # an argument that cannot be a key, nor be right
            return operator(*args, **kwargs)
        if recipe is operator:
            return _watched(operator, known, key, operands, args, kwargs)
        if recipe is None or _profiled():
            return operator(*args, **kwargs)
        if every_time is not None:
            every_time(*args, **kwargs)
        result = recipe(key[0], addresses)
        return operator(*args, **kwargs) if result is None else result

    return call


def _watched(operator: Callable, known: dict, key: tuple, operands: list[torch.Tensor], args: tuple, kwargs: dict):
    """Call ``operator`` and remember its launches, or that they cannot be."""
    if torch.cuda.is_current_stream_capturing():
        return operator(*args, **kwargs)  # which may have to make do without counters
    _watching.recording = recording = _Recording()
    try:
        result = operator(*args, **kwargs)
    finally:
        _watching.recording = None
    try:
        recipe = _Recipe(recording, operands, result)
    except ValueError:
        recipe = None
    if len(known) >= MOST_FORMS:
        known.clear()
    known[key] = recipe
    return result


def forget() -> None:
    """Forget all forms: for whoever changes what an operator would choose, a table of schedules say."""
    for known in _forms:
        known.clear()


# ------------------------------------------------------------------------------------------------ counters

FINISHED_COUNTERS = 1 << 22
"""Counters that all captured CUDA graphs share out among themselves."""

_reserve: dict[torch.device, list] = {}
_of_stream: dict[tuple[torch.device, int], torch.Tensor] = {}


def finished_counters(tiles: int, device: torch.device) -> torch.Tensor | None:
    """Zeros that a launch whose programs wait for each other counts in (see its kernel); it leaves zeros behind.

    Two launches that run at once must not share them. Eager launches of one stream run one after another and share
    the stream's. A replayed CUDA graph may run beside anything, so each captured call keeps a stretch of its own,
    of a reserve that an eager call set up before. ``None`` if there is no reserve, or no more of it: take the
    chunks in turn then, for the same bits.
    """
    if device.type != "cuda":
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        reserve, used = _reserve.get(device, (None, FINISHED_COUNTERS))
        if used + tiles > FINISHED_COUNTERS:
            return None
        _reserve[device][1] = used + tiles
        return reserve[used : used + tiles]
    if device not in _reserve:
        _reserve[device] = [torch.zeros(FINISHED_COUNTERS, dtype=torch.int32, device=device), 0]
    stream = device, driver.active.get_current_stream(device.index)
    if stream not in _of_stream or len(_of_stream[stream]) < tiles:
        _of_stream[stream] = torch.zeros(max(2 * tiles, 1 << 16), dtype=torch.int32, device=device)
    counters = _of_stream[stream][:tiles]
    if _watching.recording is not None:
        _watching.recording.counters.append(counters)
    return counters


@contextmanager
def borrowed_counters() -> Iterator[None]:
    """Takes back, at the end, the counters of graphs captured within. They must not be replayed after that.

    For whoever captures thousands of launches and throws the graphs away, such as a tuner.
    """
    used = {device: entry[1] for device, entry in _reserve.items()}
    try:
        yield
    finally:
        for device, entry in _reserve.items():
            entry[1] = used.get(device, 0)
