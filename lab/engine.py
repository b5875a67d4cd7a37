"""A small serving engine: continuous batching, chunked prefill, prefix caching, decode by CUDA graphs.

    engine = Engine(model, max_requests=64, max_length=1024)
    completions = engine.run([Request(prompt=[1, 2, 3], max_new_tokens=20), ...])

A step is one launch of prefill (chunks of prompts, of several requests if they fit) and one of decoding (a token for
every request past its prompt). Both are `_Launch`es: buffers of a fixed size and, on a GPU, a CUDA graph over them,
so that a step costs the host a copy of a few numbers and a replay. Sampled tokens stay on the device, where the next
step picks them up; the host reads them one step late and never makes the GPU wait.

Why a request's numbers do not depend on its company: on the model's invariant operators a token's logits keep their
bits however its sequence was cut into chunks, wherever its pages lie, whoever computed the pages of a shared prefix,
and whatever rows or padding surround it; and a draw depends on the request's seed and the token's position alone.
On stock operators nothing of that holds, which is what the engine lets one see.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import heappop, heappush
from operator import index

import torch

from kernels.paging import HEADER, finish_step, place_tokens
from kernels.softmax import sample
from lab.llama import Batch, Llama

# --------------------------------------------------------------------------------------------- requests


MAX_TEMPERATURE = 1e36
"""In fp32 its product with the largest noise, about 23, is still finite."""


@dataclass(frozen=True)
class Request:
    """What to complete, and how."""

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the most probable token (the lowest, if several are)."""
    top_p: float = 1.0
    seed: int = 0
    stop: Collection[int] = ()
    """Tokens that end the completion, of which they are the last."""
    arrival: int = 0
    """The engine's step before which the request is not there."""

    def check(self, vocab: int) -> None:
        """Raise what is wrong with it.

        Raises:
            TypeError: a token or another whole number that is none; ``prompt`` or ``stop`` that cannot be read twice.
            ValueError: an empty prompt, a token outside the vocabulary, a sampling value out of range.
        """
        for name in ("prompt", "stop"):
            if not isinstance(getattr(self, name), Collection):
                raise TypeError(f"{name} must be a sequence of tokens, got {getattr(self, name)!r}")
        for name in ("max_new_tokens", "seed", "arrival"):
            try:
                index(getattr(self, name))
            except TypeError:
                raise TypeError(f"{name} must be an integer, got {name}={getattr(self, name)!r}") from None
        if not len(self.prompt):
            raise ValueError("prompt must have at least one token, got an empty one")
        for name, tokens in (("prompt", self.prompt), ("stop", self.stop)):
            wrong = [token for token in map(index, tokens) if not 0 <= token < vocab]
            if wrong:
                raise ValueError(f"{name} holds token {wrong[0]!r}, outside the vocabulary of {vocab}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got max_new_tokens={self.max_new_tokens}")
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature must lie in [0, {MAX_TEMPERATURE:g}], got temperature={self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got top_p={self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2^63), got seed={self.seed}")
        if self.arrival < 0:
            raise ValueError(f"arrival must not be negative, got arrival={self.arrival}")


@dataclass
class Completion:
    """What came of a request."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    """Of each token, by the model's log-softmax at temperature 1."""
    logits: list[torch.Tensor] = field(default_factory=list)
    """(vocab,) each, on the CPU, if the engine keeps them."""
    finish: str | None = None
    """``"length"`` or ``"stop"``; ``None`` while it runs."""
    cached_tokens: int = 0
    """Tokens of the prompt whose keys another request had left in the cache."""


@dataclass
class _Sequence:
    """A request on its way."""

    request: Request
    prompt: list[int]
    completion: Completion
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    prefilled: int = 0
    """Tokens of the prompt whose keys are in the cache or on their way there."""
    launched: int = 0
    """Tokens sampled or on their way."""

    @property
    def length(self) -> int:
        return len(self.prompt) + self.request.max_new_tokens


# ------------------------------------------------------------------------------------------------ memory


class Pages:
    """Which sequence owns which pages of the cache, and which full pages hold a prefix that can be used again.

    A page is known by what led to it: the known page before it, and its own tokens. Equal tokens, not equal hashes,
    make a hit. Pages of finished sequences stay known until their room is needed, the longest unused first.
    """

    def __init__(self, pages: int, page_size: int, slots: int, reuse: bool):
        self.page_size, self.reuse = page_size, reuse
        self.users = [0] * pages
        self.unused: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))
        self.free_slots = list(range(slots - 1, -1, -1))
        self._page_of: dict[tuple, int] = {}
        self._key_of: dict[int, tuple] = {}
        self._serial: dict[int, int] = {}
        self._serials = 0

    def _known(self, prompt: Sequence[int]) -> list[int]:
        """Pages that hold the beginning of ``prompt``. Its last token is always computed: its logits are wanted."""
        known, before = [], 0
        for at in range(0, len(prompt) - self.page_size, self.page_size) if self.reuse else ():
            page = self._page_of.get((before, tuple(prompt[at : at + self.page_size])))
            if page is None:
                break
            known.append(page)
            before = self._serial[page]
        return known

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key], self._serial[page]

    def learn(self, prompt: Sequence[int], pages: list[int], computed: int) -> None:
        """The first ``computed`` tokens of ``prompt`` are launched into ``pages``: full ones can be used again."""
        before = 0
        for i in range(computed // self.page_size if self.reuse else 0):
            key = (before, tuple(prompt[i * self.page_size : (i + 1) * self.page_size]))
            page = self._page_of.get(key)
            if page is None:
                page = pages[i]
                if page in self._key_of:
                    return  # known by another way here, whose beginning was forgotten since
                self._serials += 1
                self._page_of[key], self._key_of[page], self._serial[page] = page, key, self._serials
            before = self._serial[page]

    def admit(self, prompt: Sequence[int], length: int) -> tuple[int, list[int], int, list[tuple[int, int]]] | None:
        """Room for a sequence that will grow to ``length`` tokens, all of it at once: who is in can finish.

        Returns:
            its slot, its pages, how many of them already hold its prompt's beginning, and pages to copy (from, to)
            before it runs; ``None`` if there is no room now.
        """
        known = self._known(prompt)
        fresh = -(-length // self.page_size) - len(known)
        available = len(self.unused) - sum(self.users[page] == 0 for page in known)
        if not self.free_slots or fresh > available:
            return None
        for page in known:
            self._use(page)
        pages = known + [self._take() for _ in range(fresh)]
        return self.free_slots.pop(), pages, len(known), []

    def _use(self, page: int) -> None:
        self.users[page] += 1
        self.unused.pop(page, None)

    def _take(self) -> int:
        page, _ = self.unused.popitem(last=False)
        self._forget(page)
        self.users[page] = 1
        return page

    def release(self, slot: int, pages: list[int]) -> None:
        """A sequence is done with its slot and pages."""
        self.free_slots.append(slot)
        for page in reversed(pages):  # the end of a prefix is given up before its beginning
            self.users[page] -= 1
            if self.users[page] == 0:
                self.unused[page] = None
                if page not in self._key_of:
                    self.unused.move_to_end(page, last=False)


class Stretches(Pages):
    """Pages for operators that want a sequence's keys in one stretch: every slot owns the same pages for ever.

    A prefix found in another slot's pages is copied.
    """

    def __init__(self, pages_per_slot: int, page_size: int, slots: int, reuse: bool):
        super().__init__(slots * pages_per_slot, page_size, slots, reuse)
        self.pages_per_slot = pages_per_slot

    def admit(self, prompt: Sequence[int], length: int) -> tuple[int, list[int], int, list[tuple[int, int]]] | None:
        if not self.free_slots:
            return None
        slot = self.free_slots.pop(0)
        pages = list(range(slot * self.pages_per_slot, (slot + 1) * self.pages_per_slot))
        known = self._known(prompt)
        copies = [(page, own) for page, own in zip(known, pages, strict=False) if page != own]
        kept = {page for page in known if page in pages}
        for page in pages:
            if page not in kept:
                self._forget(page)
        return slot, pages, len(known), copies

    def release(self, slot: int, pages: list[int]) -> None:
        self.free_slots.append(slot)


# --------------------------------------------------------------------------------------------- launches


class _Launch:
    """One shape of step: ``tokens`` tokens of at most ``rows`` sequences, in buffers that never move.

    The host writes ``inputs`` (rows, and for prefill cu_q, starts and tokens), then calls ``run``; ``result`` holds
    token and log-probability of every row. What the buffers hold past the rows in use is harmless: padding has no
    slot, no keys and no place in the cache.
    """

    def __init__(self, engine: Engine, rows: int, tokens: int | None = None):
        self.engine, self.decode = engine, tokens is None
        device = engine.model.device
        int32 = partial(torch.zeros, dtype=torch.int32, device=device)
        self.rows = rows
        size = rows if self.decode else 3 * rows + 1 + tokens
        self.inputs = torch.full((size,), -1, dtype=torch.int32, device=device)
        self.cu_q = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.starts, self.tokens = None, int32(rows)
        if not self.decode:
            _, self.cu_q, self.starts, self.tokens = self.inputs.split((rows, rows + 1, rows, tokens))
            self.inputs[rows:] = 0
        count = len(self.tokens)
        self.batch = Batch(
            tokens=self.tokens,
            positions=int32(count),
            slots=int32(count),
            page_table=int32(rows, engine.max_pages),
            kv_lens=int32(rows),
            cu_q=self.cu_q,
            max_q=1 if self.decode else tokens,
        )
        self.last = int32(rows)
        self.temperature, self.top_p = torch.zeros(rows, device=device), torch.ones(rows, device=device)
        self.seed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.result = int32(rows, 2)
        self.logits: torch.Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.written: list[int] | None = None
        if engine.cuda_graphs:
            self._capture()

    def _compute(self) -> None:
        engine, batch, rows = self.engine, self.batch, self.inputs[: self.rows]
        model = engine.model
        place_tokens(
            rows,
            self.cu_q,
            self.starts,
            engine.state,
            engine.lengths,
            engine.last_token,
            engine.page_size,
            tokens=batch.tokens,
            positions=batch.positions,
            slots=batch.slots,
            page_table=batch.page_table,
            kv_lens=batch.kv_lens,
            last=self.last,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )
        hidden = model.forward(batch, engine.cache)
        if not self.decode:
            hidden = hidden.index_select(0, self.last)
        self.logits = model.head(hidden)
        # The token will stand where the keys end: that is the position its draw depends on.
        ids, log_probs = sample(self.logits, self.temperature, self.top_p, self.seed, batch.kv_lens)
        finish_step(rows, batch.kv_lens, ids, log_probs, engine.lengths, engine.last_token, self.result)

    def _capture(self) -> None:
        """Record the step while all rows are padding, so that nothing of it counts."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compute()  # compiles kernels and sets up workspaces: nothing of that may happen under capture
            self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.engine.graph_pool):
            self._compute()

    def run(self, inputs: list[int]) -> None:
        """Send ``inputs`` if they are not those of the last time, and launch."""
        if inputs != self.written or not self.decode:
            self.engine.upload(self.inputs[: len(inputs)], inputs)
            self.written = inputs
        if self.graph is None:
            self._compute()
        else:
            self.graph.replay()


@dataclass
class _Pending:
    """A launch whose results the host has not read."""

    step: int
    sequences: list[_Sequence | None]
    """Whose token a row holds; ``None`` for a chunk that does not end its prompt."""
    result: torch.Tensor
    logits: torch.Tensor | None
    event: torch.cuda.Event | None


# ------------------------------------------------------------------------------------------------ engine


def _bucket(n: int, buckets: Sequence[int]) -> int:
    return next(bucket for bucket in buckets if bucket >= n)


def decode_buckets(most: int) -> list[int]:
    """Batch sizes that decode graphs are made for: 1, 2, 4, 8, 16, then steps of at most a half, up to ``most``."""
    steps = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, 257, 32), *range(320, 4096, 64)]
    return [step for step in steps if step < most] + [most]


class Engine:
    """Runs requests through a model. Everything on one stream; one engine at a time per model and thread."""

    def __init__(
        self,
        model: Llama,
        *,
        max_requests: int = 64,
        max_length: int = 2048,
        pages: int | None = None,
        page_size: int = 64,
        chunk: int = 512,
        prefill_rows: int = 16,
        prefix_caching: bool = True,
        cuda_graphs: bool | None = None,
        keep_logits: bool = False,
    ):
        """Makes the cache; graphs are captured when a step of their size first comes.

        Args:
            max_requests: most that run at once; more wait.
            max_length: most tokens of prompt and completion together.
            pages: pages of the cache; enough for all to be of ``max_length`` if not given. With fewer, requests wait.
                Stock operators keep each sequence in one stretch and need them all.
            page_size: tokens a page holds, a multiple of 16.
            chunk: most tokens that one step prefills.
            prefill_rows: most prompts that one step prefills.
            prefix_caching: use full pages again whose tokens, and all before them, are the same.
            cuda_graphs: replay steps from graphs; on a GPU with a 16-bit model if not given.
            keep_logits: keep the logits of every sampled token, which costs time and memory.

        Raises:
            ValueError: a size out of range.
        """
        sizes = {"max_requests": max_requests, "max_length": max_length, "chunk": chunk, "prefill_rows": prefill_rows}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {name}={value}")
        if max_length > model.max_positions:
            raise ValueError(f"max_length={max_length}, but the model has {model.max_positions} positions prepared")
        if page_size < 16 or page_size % 16:
            raise ValueError(f"page_size must be a multiple of 16, got page_size={page_size}")
        able = model.device.type == "cuda" and model.dtype != torch.float32
        if cuda_graphs and not able:
            raise ValueError(f"cuda_graphs needs a GPU and a 16-bit model, got {model.dtype} on {model.device}")
        self.model, self.page_size, self.chunk, self.keep_logits = model, page_size, chunk, keep_logits
        self.max_requests, self.max_length = max_requests, max_length
        self.prefill_rows = min(prefill_rows, max_requests, chunk)
        self.max_pages = -(-max_length // page_size)
        stock, most = model.operators.name == "torch", max_requests * self.max_pages
        if pages is not None and (pages < 1 or (stock and pages != most)):
            raise ValueError(f"pages must be at least 1, and {most} for stock operators, got pages={pages}")
        self.pages: Pages = (
            Stretches(self.max_pages, page_size, max_requests, prefix_caching)
            if stock
            else Pages(pages or most, page_size, max_requests, prefix_caching)
        )
        self.cuda_graphs = able if cuda_graphs is None else cuda_graphs
        self.graph_pool = torch.cuda.graph_pool_handle() if self.cuda_graphs else None
        device = model.device
        self.cache = model.new_cache(len(self.pages.users), page_size)
        self.state = torch.zeros(max_requests, HEADER + self.max_pages, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self.last_token = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self.steps = 0
        self._to_come: list[tuple[int, int, _Sequence]] = []  # a heap: arrival, order of submission
        self._waiting: deque[_Sequence] = deque()
        self._submitted = 0
        self._prefilling: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._pending: deque[_Pending] = deque()
        self._decoders: dict[int, _Launch] = {}
        self._prefillers: dict[int, _Launch] = {}
        self._decode_buckets = decode_buckets(max_requests)
        self._prefill_buckets = [16 << i for i in range(16) if 16 << i < chunk] + [chunk]

    # ------------------------------------------------------------------------------------------- in and out

    def submit(self, request: Request) -> Completion:
        """Queue a request; its completion fills up as the engine steps.

        Raises:
            TypeError: a token that is not an integer.
            ValueError: a request that is wrong in itself, or that could never fit.
        """
        self.check(request)
        # Copied: what the caller does to them later is not this request's business.
        request = replace(request, stop=frozenset(map(index, request.stop)))
        sequence = _Sequence(request, [index(token) for token in request.prompt], Completion())
        heappush(self._to_come, (request.arrival, self._submitted, sequence))
        self._submitted += 1
        return sequence.completion

    def check(self, request: Request) -> None:
        """Raise what ``submit`` would raise."""
        request.check(self.model.config.vocab)
        length = len(request.prompt) + request.max_new_tokens
        if length > self.max_length:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and max_new_tokens={request.max_new_tokens} "
                f"make {length}, more than max_length={self.max_length}"
            )
        pages = -(-length // self.page_size)
        if pages > len(self.pages.users):
            raise ValueError(
                f"a request of {length} tokens needs {pages} pages, the cache has {len(self.pages.users)}"
            )

    def run(self, requests: Iterable[Request]) -> list[Completion]:
        """Complete all of them, in whatever company ``arrival`` and the cache give them; results in their order."""
        requests = list(requests)
        for request in requests:
            self.check(request)
        completions = [self.submit(request) for request in requests]
        while self.busy:
            self.step()
        return completions

    @property
    def busy(self) -> bool:
        """Whether any request has not finished."""
        return bool(self._to_come or self._waiting or self._prefilling or self._running or self._pending)

    def upload(self, target: torch.Tensor, values: list[int]) -> None:
        """Write host numbers into ``target`` without waiting for the device."""
        source = torch.tensor(values, dtype=torch.int32)
        target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)

    # ------------------------------------------------------------------------------------------------ steps

    def step(self) -> None:
        """Launch what there is to do, then read what earlier launches made."""
        launched = self._prefill()
        launched |= self._decode()
        # A GPU works on this step while the host reads the last one.
        late = launched and self.model.device.type == "cuda"
        while self._pending and self._pending[0].step < self.steps + (not late):
            self._collect(self._pending.popleft())
        self.steps += 1

    def _admit(self) -> _Sequence | None:
        """The next request that has arrived, if there is room. First come, first served: none waits for ever."""
        while self._to_come and self._to_come[0][0] <= self.steps:
            self._waiting.append(heappop(self._to_come)[2])
        if not self._waiting:
            return None
        sequence = self._waiting[0]
        room = self.pages.admit(sequence.prompt, sequence.length)
        if room is None:
            return None
        sequence.slot, sequence.pages, known, copies = room
        try:
            self._settle(sequence, known, copies)
        except BaseException:  # an interrupt: it stays the first in the queue, and its room is free again
            self.pages.release(sequence.slot, sequence.pages)
            raise
        return self._waiting.popleft()

    def _settle(self, sequence: _Sequence, known: int, copies: list[tuple[int, int]]) -> None:
        """Copy what is known of a prompt to where it is wanted, and tell the device where the sequence lives."""
        request = sequence.request
        sequence.prefilled = sequence.completion.cached_tokens = known * self.page_size
        if copies:
            moves = torch.empty(2, len(copies), dtype=torch.int32, device=self.model.device)
            self.upload(moves.view(-1), [page for pages in zip(*copies, strict=True) for page in pages])
            source, target = moves.long()
            self.cache.data.index_copy_(2, target, self.cache.data.index_select(2, source))
        floats = torch.tensor([request.temperature, request.top_p], dtype=torch.float32).view(torch.int32).tolist()
        seed = torch.tensor([index(request.seed)], dtype=torch.int64).view(torch.int32).tolist()
        row = [*seed, *floats, *sequence.pages[: self.max_pages]]
        self.upload(self.state[sequence.slot, : len(row)], row)

    def _prefill(self) -> bool:
        """Launch up to ``chunk`` tokens of prompts, the oldest first."""
        parts: list[tuple[_Sequence, int]] = []
        try:
            launch = self._launch_parts(parts)
        except BaseException:  # an interrupt, no memory: who was taken out goes back, and a later step tries again
            self._prefilling.extendleft(sequence for sequence, _ in reversed(parts))
            raise
        if launch is None:
            return False
        owners: list[_Sequence | None] = []
        unfinished = []
        for sequence, count in parts:
            sequence.prefilled += count
            self.pages.learn(sequence.prompt, sequence.pages, sequence.prefilled)
            done = sequence.prefilled == len(sequence.prompt)
            owners.append(sequence if done else None)
            if not done:
                unfinished.append(sequence)
                continue
            sequence.launched = 1
            if sequence.request.max_new_tokens > 1:
                self._running.append(sequence)
        self._prefilling.extendleft(reversed(unfinished))
        self._expect(launch, owners)
        return True

    def _launch_parts(self, parts: list[tuple[_Sequence, int]]) -> _Launch | None:
        """Take sequences and how many tokens of each into ``parts``, and launch them."""
        room = self.chunk
        while room and len(parts) < self.prefill_rows:
            if self._prefilling:
                sequence = self._prefilling.popleft()
            elif (sequence := self._admit()) is None:
                break
            count = min(room, len(sequence.prompt) - sequence.prefilled)
            parts.append((sequence, count))
            room -= count
        if not parts:
            return None
        size = _bucket(self.chunk - room, self._prefill_buckets)
        rows, padding = self.prefill_rows, self.prefill_rows - len(parts)
        starts, cu_q, tokens = [], [0], []
        for sequence, count in parts:
            starts.append(sequence.prefilled)
            tokens += sequence.prompt[sequence.prefilled : sequence.prefilled + count]
            cu_q.append(len(tokens))
        slots = [sequence.slot for sequence, _ in parts]
        inputs = [*slots, *[-1] * padding, *cu_q, *cu_q[-1:] * padding, *starts, *[0] * padding, *tokens]
        launch = self._launch(self._prefillers, size, lambda: _Launch(self, rows, size))
        launch.run(inputs)
        return launch

    def _decode(self) -> bool:
        """Launch one token for every running request."""
        if not self._running:
            return False
        sequences = self._running
        size = _bucket(len(sequences), self._decode_buckets)
        launch = self._launch(self._decoders, size, lambda: _Launch(self, size))
        launch.run([sequence.slot for sequence in sequences] + [-1] * (size - len(sequences)))
        for sequence in sequences:
            sequence.launched += 1
        self._expect(launch, sequences)
        self._running = [s for s in sequences if s.launched < s.request.max_new_tokens]
        return True

    def _launch(self, launches: dict[int, _Launch], size: int, make: Callable[[], _Launch]) -> _Launch:
        if size not in launches:
            launches[size] = make()
        return launches[size]

    def warm_up(self) -> None:
        """Compile and capture every size of step now instead of when it first comes."""
        for size in reversed(self._decode_buckets):
            self._launch(self._decoders, size, lambda size=size: _Launch(self, size))
        for size in reversed(self._prefill_buckets):
            self._launch(self._prefillers, size, lambda size=size: _Launch(self, self.prefill_rows, size))

    def _expect(self, launch: _Launch, sequences: list[_Sequence | None]) -> None:
        """Start the copy of a launch's results to the host."""
        used = len(sequences)
        event = None
        if launch.result.is_cuda:
            result = torch.empty((used, 2), dtype=torch.int32, pin_memory=True)
            result.copy_(launch.result[:used], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            result = launch.result[:used].clone()
        logits = launch.logits[:used].cpu() if self.keep_logits else None
        self._pending.append(_Pending(self.steps, list(sequences), result, logits, event))

    def _collect(self, pending: _Pending) -> None:
        """Read one launch's results; finished sequences leave."""
        if pending.event is not None:
            pending.event.synchronize()
        tokens = pending.result[:, 0].tolist()
        log_probs = pending.result.view(torch.float32)[:, 1].tolist()
        for i, sequence in enumerate(pending.sequences):
            if sequence is None or sequence.completion.finish is not None:
                continue  # a token launched before the host had read that the one before it was the last
            completion, request = sequence.completion, sequence.request
            completion.tokens.append(tokens[i])
            completion.log_probs.append(log_probs[i])
            if pending.logits is not None:
                completion.logits.append(pending.logits[i])
            if tokens[i] in request.stop:
                completion.finish = "stop"
                self._running = [s for s in self._running if s is not sequence]
            elif len(completion.tokens) == request.max_new_tokens:
                completion.finish = "length"
            if completion.finish is not None:
                self.pages.release(sequence.slot, sequence.pages)
