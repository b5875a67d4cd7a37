"""The serving engine: nobody is lost, nothing is wrong, and on our operators nobody notices the company.

Without a GPU a request's logits are compared bit by bit all the same. NumPy's matrix product, which Triton's
interpreter uses, gives an element other bits depending on where in the tile it lies; here every product is added up
along K in order, as the tensor cores do, so that what is left to differ is the kernels' own doing.
"""

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from kernels.paging import HEADER, finish_step, place_tokens
from lab.check import same_bits
from lab.checkpoint import LlamaConfig
from lab.device import current_device
from lab.engine import Engine, Pages, Request, Stretches, decode_buckets
from lab.llama import Llama

DEVICE = current_device().torch_device
SMALL = LlamaConfig(
    "small", vocab=64, hidden=64, layers=2, heads_q=2, heads_kv=1, head_dim=64, ffn=64, rope_theta=10_000.0,
    max_positions=128,
)  # fmt: skip


@pytest.fixture
def dot_in_order(monkeypatch):
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        x, y, total = a.data.astype(np.float32), b.data.astype(np.float32), d.data.copy()
        with np.errstate(invalid="ignore"):  # padding may hold anything
            for k in range(x.shape[1]):
                total += x[:, k, None] * y[k]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(scope="module")
def models():
    ours = Llama.random(SMALL, dtype=torch.float16, device=DEVICE)
    return {"batch_invariant": ours, "torch": ours.with_operators("torch")}


def engine(model, **options):
    defaults = {"max_requests": 3, "max_length": 48, "page_size": 16, "chunk": 12, "prefill_rows": 2}
    return Engine(model, **(defaults | options))


def alone(model, request, **options):
    return engine(model, max_requests=1, prefill_rows=1, **options).run([replace(request, arrival=0)])[0]


def mixed_requests(count=5, tokens=3, seed=0):
    """Prompts that share a beginning, greedy and sampled, arriving over time."""
    draw = random.Random(seed)
    shared = [draw.randrange(64) for _ in range(18)]
    return [
        Request(
            shared[: 5 if i == 2 else 18] + [draw.randrange(64) for _ in range(draw.randrange(1, 9))],
            draw.randrange(1, tokens + 1),
            temperature=0.8 * (i % 2),
            top_p=0.9 if i == 3 else 1.0,
            seed=i,
            arrival=draw.randrange(4),
        )
        for i in range(count)
    ]


# ------------------------------------------------------------------------------------------- same answers


def test_a_request_keeps_its_bits_in_any_company(models, dot_in_order):
    """Other requests, arrival, chunks, pages and a shared prefix: logits, tokens and log-probabilities all stay."""
    model, requests = models["batch_invariant"], mixed_requests(4)
    want = [alone(model, request, chunk=64, prefix_caching=False, keep_logits=True) for request in requests]
    hits = 0
    for options in (
        {"chunk": 25, "max_requests": 4, "prefill_rows": 3, "page_size": 32},
        {"chunk": 9, "max_requests": 2, "pages": 4},
    ):
        completions = engine(model, keep_logits=True, **options).run(requests)
        hits += sum(completion.cached_tokens for completion in completions)
        for got, expected in zip(completions, want, strict=True):
            assert (got.tokens, got.log_probs) == (expected.tokens, expected.log_probs)
            assert same_bits(torch.stack(got.logits), torch.stack(expected.logits))
    assert hits, "no prefix was used again"


def test_a_full_forward_pass_has_the_bits_of_the_engine(models, dot_in_order):
    """Trainer and sampler: one pass over prompt and completion, against prefill in chunks and decode."""
    model = models["batch_invariant"]
    request = Request(list(range(7, 24)), 4, temperature=1.0, seed=3)
    sampled = engine(model, keep_logits=True, chunk=5).run([request])[0]
    tokens = torch.tensor([*request.prompt, *sampled.tokens])
    start = len(request.prompt) - 1
    assert same_bits(model.logits(tokens).cpu()[start:-1], torch.stack(sampled.logits))
    assert model.token_log_probs(tokens)[start:].tolist() == sampled.log_probs


@pytest.mark.parametrize("operators", ["batch_invariant", "torch"])
def test_logits_are_those_of_a_full_forward_pass(operators, models):
    """To rounding, on either set of operators: chunks, pages, prefixes and padding lead nowhere else."""
    model = models[operators]
    for request, got in zip(
        requests := mixed_requests(4, 2), engine(model, keep_logits=True).run(requests), strict=True
    ):
        tokens = torch.tensor([*request.prompt, *got.tokens])
        whole = model.logits(tokens).cpu()[len(request.prompt) - 1 : -1]
        assert torch.allclose(torch.stack(got.logits).float(), whole.float(), atol=4e-3)


def test_greedy_tokens_are_the_largest_logits_and_seeds_change_a_draw(models):
    model = models["torch"]
    greedy = engine(model, keep_logits=True).run([Request([1, 2, 3], 4)])[0]
    assert greedy.tokens == torch.stack(greedy.logits).float().argmax(-1).tolist()
    hot = [Request([1, 2, 3], 6, temperature=5.0, seed=seed) for seed in (1, 2, 1)]
    tokens = [completion.tokens for completion in engine(model).run(hot)]
    assert tokens[0] == tokens[2] != tokens[1]


# ------------------------------------------------------------------------------------------ coming and going


@pytest.mark.parametrize("operators", ["batch_invariant", "torch"])
def test_more_requests_than_fit_all_finish(operators, models):
    pages = {"pages": 3} if operators == "batch_invariant" else {}
    requests = [Request([i, i + 1], 1 + i % 3, arrival=i // 3) for i in range(5)]
    running = engine(models[operators], max_requests=2, **pages)
    completions = running.run(requests)
    assert [len(c.tokens) for c in completions] == [r.max_new_tokens for r in requests]
    assert {c.finish for c in completions} == {"length"}
    assert not running.busy


def test_a_full_cache_makes_requests_wait_in_order(models):
    running = engine(models["batch_invariant"], pages=3, prefix_caching=False)
    first, large, small = (running.submit(r) for r in (Request([1] * 12, 6), Request([2] * 20, 2), Request([3], 1)))
    while not first.tokens:
        running.step()
    assert not large.tokens and not small.tokens, "two pages are taken, two more wanted; nobody overtakes"
    while running.busy:
        running.step()
    assert [len(c.tokens) for c in (first, large, small)] == [6, 2, 1]


def test_arrival_is_a_step(models):
    running = engine(models["torch"])
    late = running.submit(Request([1], 1, arrival=3))
    for _ in range(3):
        assert running.busy
        running.step()
        assert not late.tokens
    while running.busy:
        running.step()
    assert late.finish == "length"
    assert running.steps >= 4


def test_a_stop_token_ends_a_completion(models):
    model = models["torch"]
    tokens = engine(model).run([Request([5, 6], 6, temperature=3.0)])[0].tokens
    stop = tokens[2]
    got = engine(model).run([Request([5, 6], 6, temperature=3.0, stop=[stop]), Request([9], 6)])
    assert got[0].tokens == tokens[: tokens.index(stop) + 1]
    assert got[0].finish == "stop"
    assert len(got[1].tokens) == 6


@pytest.mark.parametrize("operators", ["batch_invariant", "torch"])
def test_a_prefix_is_used_again_by_full_pages(operators, models):
    prompt = list(range(20))
    running = engine(models[operators])
    first, same, longer, other = (
        running.run([Request(p, 1)])[0] for p in (prompt, prompt, [*prompt, 3], [9, *prompt[1:]])
    )
    assert [c.cached_tokens for c in (first, same, longer, other)] == [0, 16, 16, 0]
    assert first.tokens == same.tokens
    if operators == "torch":
        assert engine(models["torch"], prefix_caching=False).run([Request(prompt, 1)] * 2)[1].cached_tokens == 0


# ------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("contiguous", [False, True])
def test_pages_are_never_shared_by_mistake_nor_lost(contiguous):
    """Random comings and goings against a plain model of what each page holds."""
    draw, size, slots, per_slot = random.Random(1), 16, 4, 4
    pages = Stretches(per_slot, size, slots, True) if contiguous else Pages(10, size, slots, True)
    holds: dict[int, tuple] = {}
    running = []
    hits = refused = 0
    for _ in range(600):
        if running and draw.random() < 0.45:
            pages.release(*running.pop(draw.randrange(len(running)))[:2])
            continue
        prompt = [draw.randrange(2)] * size + [draw.randrange(2)] * draw.randrange(1, 30)
        length = len(prompt) + draw.randrange(1, 9)
        room = pages.admit(prompt, length)
        if room is None:
            refused += 1
            assert len(running) == slots or not contiguous
            continue
        slot, own, known, copies = room
        assert slot not in [other[0] for other in running]
        assert len(own) * size >= length
        hits += known
        for source, target in copies:
            holds[target] = holds[source]
        for i in range(known):
            assert holds[own[i]] == tuple(prompt[: (i + 1) * size]), "a page of another prefix"
        written = own[known:]
        for other in running:
            assert not set(written) & set(other[1]), "a page that somebody uses was given away"
        for i in range(known, len(own)):
            holds[own[i]] = tuple(prompt[: (i + 1) * size]) if (i + 1) * size <= len(prompt) else ()
        pages.learn(prompt, own, len(prompt))
        running.append((slot, own))
    assert hits and refused
    for slot, own in running:
        pages.release(slot, own)
    assert len(pages.free_slots) == slots
    if not contiguous:
        assert len(pages.unused) == 10 and not any(pages.users)


def test_a_step_is_placed_and_finished():
    """Two slots decode beside padding, then a chunk of prompts; what no sequence uses holds rubbish."""

    def int32(values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    rubbish = -77777
    state = torch.full((4, HEADER + 3), rubbish, dtype=torch.int32, device=DEVICE)
    seed, floats = 2**40 + 5, torch.tensor([0.5, 0.25]).view(torch.int32).tolist()
    state[2, :6] = int32([5, 2**8, *floats, 7, 1])
    state[0, :5] = int32([*torch.tensor([2**63 - 1]).view(torch.int32).tolist(), *floats, 3])
    lengths, last_token = int32([4, rubbish, 16, rubbish]), int32([11, rubbish, 22, rubbish])

    def buffers(rows, tokens):
        def full(*shape):
            return torch.full(shape, rubbish, dtype=torch.int32, device=DEVICE)

        return {
            "tokens": full(tokens), "positions": full(tokens), "slots": full(tokens), "page_table": full(rows, 3),
            "kv_lens": full(rows), "last": full(rows), "temperature": torch.full((rows,), 9.0, device=DEVICE),
            "top_p": torch.full((rows,), 9.0, device=DEVICE),
            "seed": torch.full((rows,), 9, dtype=torch.int64, device=DEVICE),
        }  # fmt: skip

    rows, out = int32([2, 0, -1]), buffers(3, 3)
    place_tokens(rows, int32([0, 1, 2, 3]), None, state, lengths, last_token, 16, **out)
    values = {name: x.tolist() for name, x in out.items() if name != "page_table"}
    assert values == {
        "tokens": [22, 11, 0], "positions": [16, 4, 0], "slots": [16, 52, -1], "kv_lens": [17, 5, 0],
        "last": [0, 1, 0], "temperature": [0.5, 0.5, 0.0], "top_p": [0.25, 0.25, 1.0], "seed": [seed, 2**63 - 1, 0],
    }  # fmt: skip
    assert [out["page_table"][0, :2].tolist(), out["page_table"][1, 0].item()] == [[7, 1], 3]

    ids, log_probs = torch.tensor([6, 7, 8], device=DEVICE), torch.tensor([-1.0, -2.0, -3.0], device=DEVICE)
    result = int32([[0, 0]] * 3)
    finish_step(rows, out["kv_lens"], ids, log_probs, lengths, last_token, result)
    assert result[:, 0].tolist() == [6, 7, 8]
    assert result.view(torch.float32)[:, 1].tolist() == [-1.0, -2.0, -3.0]
    assert (lengths.tolist(), last_token.tolist()) == ([5, rubbish, 17, rubbish], [7, rubbish, 6, rubbish])

    out = buffers(3, 8)
    out["tokens"][:5] = int32([1, 2, 3, 4, 5])
    place_tokens(rows, int32([0, 3, 5, 5]), int32([14, 0, 0]), state, lengths, last_token, 16, **out)
    assert out["tokens"].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert out["positions"].tolist() == [14, 15, 16, 0, 1, 0, 0, 0]
    assert out["slots"].tolist() == [126, 127, 16, 48, 49, -1, -1, -1]
    assert (out["kv_lens"].tolist(), out["last"].tolist()) == ([17, 2, 0], [2, 4, 0])


def test_who_arrives_first_is_served_first(models):
    """Also when submitted last; those that arrive together go in the order of submission."""
    running, order = engine(models["torch"], max_requests=1), []
    completions = {
        name: running.submit(Request([1, 2, 3], 2, arrival=arrival))
        for name, arrival in {"late": 9, "first": 0, "second": 2, "third": 2}.items()
    }
    while running.busy:
        running.step()
        order += [name for name, c in completions.items() if c.finish and name not in order]
    assert order == ["first", "second", "third", "late"]


def test_decode_buckets_cover_every_size():
    for most in (1, 3, 16, 256, 300):
        buckets = decode_buckets(most)
        assert buckets == sorted(set(buckets)) and buckets[-1] == most
    assert max(b / a for a, b in pairwise(buckets[4:])) <= 1.5


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request([], 1), ValueError, "empty"),
        (Request([1, 64], 1), ValueError, "token 64, outside the vocabulary of 64"),
        (Request([-1], 1), ValueError, "token -1"),
        (Request([1.5], 1), TypeError, "float"),
        (Request(iter([1]), 1), TypeError, "prompt must be a sequence of tokens"),
        (Request([1], 1, stop=iter([2])), TypeError, "stop must be a sequence of tokens"),
        (Request([1], 2.0), TypeError, "max_new_tokens=2.0"),
        (Request([1], 1, seed=5.0), TypeError, "seed=5.0"),
        (Request([1], 1, arrival=float("inf")), TypeError, "arrival=inf"),
        (Request([1], 1, temperature=1e39), ValueError, r"temperature=1e\+39"),
        (Request([1], 0), ValueError, "max_new_tokens=0"),
        (Request([1], 1, temperature=-0.1), ValueError, "temperature=-0.1"),
        (Request([1], 1, temperature=float("nan")), ValueError, "temperature=nan"),
        (Request([1], 1, top_p=0.0), ValueError, "top_p=0.0"),
        (Request([1], 1, top_p=1.1), ValueError, "top_p=1.1"),
        (Request([1], 1, seed=-1), ValueError, "seed=-1"),
        (Request([1], 1, stop=[99]), ValueError, "stop holds token 99"),
        (Request([1], 1, arrival=-1), ValueError, "arrival=-1"),
        (Request([1] * 40, 9), ValueError, "40 tokens and max_new_tokens=9 make 49, more than max_length=48"),
    ],
)
def test_a_wrong_request_is_refused_and_disturbs_nobody(request_, error, message, models):
    running = engine(models["torch"])
    good = running.submit(Request([1], 1))
    with pytest.raises(error, match=message):
        running.submit(request_)
    while running.busy:
        running.step()
    assert good.finish == "length"


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0, "top_p": 1}, {"temperature": np.float64(0.7)}, {"seed": np.int32(5)}, {"seed": True}],
    ids=str,
)
def test_numbers_of_any_type_mean_what_they_say(options, models, dot_in_order):
    """To the request and, whose header lies behind its own, to its neighbour."""
    plain = {name: type(getattr(Request([1], 1), name))(value) for name, value in options.items()}
    given, meant = (
        engine(models["batch_invariant"]).run([Request([9] * 20, 3), Request(range(20), 3, **values)])
        for values in (options, plain)
    )
    assert [c.tokens for c in given] == [c.tokens for c in meant]
    assert all(c.finish == "length" for c in given)


@pytest.mark.parametrize("when", ["forward", "upload"])
def test_an_interrupted_step_loses_nobody(models, monkeypatch, when):
    """Ctrl-C in the middle of a prefill, or while a request is being let in; then on."""
    model = models["torch"].with_operators("torch")
    requests = [Request([1] * 20, 2), Request([2] * 20, 2)]
    want, running = [alone(model, request) for request in requests], engine(model)
    completions = [running.submit(request) for request in requests]
    owner = model if when == "forward" else running
    carry_on, calls = getattr(owner, when), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return carry_on(*arguments)

    monkeypatch.setattr(owner, when, interrupted)
    with pytest.raises(KeyboardInterrupt):
        while running.busy:
            running.step()
    while running.busy:
        running.step()
    assert [c.tokens for c in completions] == [c.tokens for c in want]
    assert len(running.pages.free_slots) == 3


def test_one_wrong_request_keeps_all_of_its_run_out(models):
    running = engine(models["torch"])
    with pytest.raises(ValueError, match="empty"):
        running.run([Request([5], 2), Request([], 1)])
    assert not running.busy


def test_what_happens_to_a_list_of_stops_later_is_not_the_requests_business(models):
    model = models["torch"]
    tokens = alone(model, Request([3], 6)).tokens
    stops, running = [tokens[1]], engine(model)
    completion = running.submit(Request([3], 6, stop=stops))
    stops.clear()
    while running.busy:
        running.step()
    assert completion.tokens == tokens[: tokens.index(tokens[1]) + 1] and completion.finish == "stop"


def test_a_request_that_could_never_fit_is_refused(models):
    with pytest.raises(ValueError, match="needs 3 pages, the cache has 2"):
        engine(models["batch_invariant"], pages=2).submit(Request([1] * 40, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_requests": 0}, "max_requests=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"page_size": 24}, "page_size=24"),
        ({"max_length": 129}, "max_length=129.*128"),
        ({"pages": 0}, "pages=0"),
        ({"pages": 5}, "9 for stock operators, got pages=5"),
    ],
)
def test_a_wrong_engine_is_refused(options, message, models):
    with pytest.raises(ValueError, match=message):
        engine(models["torch"], **options)


def test_graphs_need_a_gpu_and_16_bits():
    model = Llama.random(SMALL, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"torch\.float32 on cpu"):
        engine(model, cuda_graphs=True)
    got = engine(model).run([Request([1, 2, 3], 2)])[0]
    assert len(got.tokens) == 2, "fp32 models run, without graphs"
