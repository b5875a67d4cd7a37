"""The whole model on a GPU: a request's logits keep their bits in any company, in any launch, against a full pass."""

import random
from dataclasses import replace

import pytest
import torch

from kernels.rope import RopeSchedule, rope_table, rope_to_cache
from kernels.softmax import SoftmaxSchedule, argmax, log_softmax, log_softmax_ref, token_log_softmax
from lab.check import check_invariance, compare, distinct_results, same_bits
from lab.device import STRADDLING
from lab.engine import Engine, Request
from lab.llama import CONFIGS, Llama
from lab.timing import relative_error

pytestmark = pytest.mark.gpu

MEDIUM = replace(CONFIGS["llama-3.2-1b"], name="medium", layers=3, max_positions=8192)
WIDE_HEADS = replace(CONFIGS["qwen3-0.6b"], name="medium qwen3", layers=3, max_positions=8192)
DTYPES = [torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def tokens_of(count, vocab=128_000, seed=0):
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=[MEDIUM, WIDE_HEADS], ids=lambda config: config.name)
def model(request):
    return Llama.random(request.param)


def engine(model, **options):
    defaults = {"max_requests": 8, "max_length": 1536, "page_size": 64, "chunk": 256, "prefill_rows": 4}
    return Engine(model, **(defaults | options))


# ----------------------------------------------------------------------------------------------- softmax


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("n", [256, 4097, 128_256])
def test_softmax_rows_keep_their_bits(n, dtype):
    m = 1025 if n < 100_000 else 130
    x = 3 * randn(m, n, dtype=dtype)
    assert relative_error(log_softmax(x[:50]), log_softmax_ref(x[:50])) <= 4e-7
    for fn in (log_softmax, argmax):
        report = check_invariance(lambda x, fn=fn: fn(x)[:, None], x, STRADDLING)
        assert report.invariant, report
    assert torch.equal(argmax(x), x.float().argmax(-1)) or dtype != torch.float32
    ids = torch.arange(m, device="cuda") * 7 % n
    assert same_bits(token_log_softmax(x, ids), log_softmax(x).gather(1, ids[:, None])[:, 0])
    assert len(distinct_results(lambda w: log_softmax(x, schedule=SoftmaxSchedule(w)), [1, 2, 4, 8, 16])) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_schedules_are_free(dtype):
    qkv, table = randn(70, 48 * 128, dtype=dtype), rope_table(4096, 128, 5e5, None, "cuda")
    positions = torch.arange(70, dtype=torch.int32, device="cuda") * 50
    slots = torch.randperm(128, generator=torch.Generator().manual_seed(0))[:70].int().cuda()
    weights = {"q_weight": randn(128, dtype=dtype), "k_weight": randn(128, dtype=dtype, seed=1)}

    def run(schedule):
        cache = torch.zeros(2, 2, 64, 8, 128, dtype=dtype, device="cuda")
        q = rope_to_cache(qkv, table, positions, slots, *cache, schedule=schedule, **weights)
        return torch.cat([q.flatten(), cache.flatten()])

    schedules = [RopeSchedule(heads, warps) for heads in (1, 2, 4, 8, 16) for warps in (1, 2, 4)]
    assert len(distinct_results(run, schedules)) == 1


# ------------------------------------------------------------------------------------------------- model


def test_logits_are_right(model):
    """Against the same model in fp32 arithmetic: at most twice the error of stock operators."""
    tokens = tokens_of(300)
    exact = Llama(model.config, model.weights.map(torch.Tensor.float), "torch").logits(tokens)
    errors = [relative_error(m.logits(tokens), exact) for m in (model, model.with_operators("torch"))]
    assert errors[0] <= 2 * errors[1], errors
    assert errors[1] < 0.05


def test_a_token_keeps_its_bits_whatever_follows(model):
    """Prefixes of a sequence: every length across the thresholds of every schedule, against the longest."""
    tokens = tokens_of(1100)
    whole = model.logits(tokens)
    for length in (1, 2, 15, 16, 17, 33, 64, 65, 129, 256, 257, 512, 513, 1024, 1025):
        difference = compare(model.logits(tokens[:length]), whole[:length])
        assert not difference.rows_differing, f"{length} tokens: {difference}"


def test_a_captured_forward_has_the_eager_bits(model):
    batch, cache = model.sequence(tokens_of(130))
    eager = model.head(model.forward(batch, cache))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model.head(model.forward(batch, cache))
    for _ in range(2):
        captured.fill_(float("nan"))
        cache.data.fill_(float("nan"))
        graph.replay()
        assert same_bits(captured, eager)


# ------------------------------------------------------------------------------------------------ engine


def mixed_requests(count, seed=0):
    draw = random.Random(seed)
    shared = [draw.randrange(100_000) for _ in range(700)]
    return [
        Request(
            shared[: draw.choice((0, 3, 64, 200, 700))]
            + [draw.randrange(100_000) for _ in range(draw.randrange(1, 90))],
            draw.choice((1, 5, 20)),
            temperature=draw.choice((0.0, 0.7, 1.5)),
            top_p=draw.choice((1.0, 0.9)),
            seed=i,
            arrival=draw.randrange(20),
        )
        for i in range(count)
    ]


def test_a_request_keeps_its_bits_in_any_company(model):
    """Arrival, neighbours, chunks, page size, page order, shared prefixes, graphs: logits and tokens stay."""
    requests = mixed_requests(24)
    single = engine(model, max_requests=1, prefill_rows=1, prefix_caching=False, keep_logits=True, chunk=1024)
    want = [single.run([replace(request, arrival=0)])[0] for request in requests]
    hits = 0
    for options in (
        {"max_requests": 24},
        {"chunk": 100, "page_size": 16, "max_requests": 5, "prefill_rows": 1},
        {"chunk": 37, "page_size": 256, "pages": 20, "cuda_graphs": False},
        {"chunk": 512, "max_requests": 16, "prefill_rows": 16},
    ):
        running = engine(model, keep_logits=True, **options)
        running.cache.data.fill_(float("nan"))  # nobody may read what nobody wrote
        draw = random.Random(1)
        order = list(range(len(requests)))
        draw.shuffle(order)
        completions = dict(zip(order, running.run([requests[i] for i in order]), strict=True))
        for i, expected in enumerate(want):
            got = completions[i]
            hits += got.cached_tokens
            difference = compare(torch.stack(got.logits), torch.stack(expected.logits))
            assert not difference.rows_differing, f"request {i}, {options}: {difference}"
            assert (got.tokens, got.log_probs) == (expected.tokens, expected.log_probs)
    assert hits, "no prefix was used again"


def test_trainer_and_sampler_agree_to_the_bit(model):
    requests = mixed_requests(16, seed=1)
    for request, sampled in zip(requests, engine(model).run(requests), strict=True):
        tokens = torch.tensor([*request.prompt, *sampled.tokens])
        trained = model.token_log_probs(tokens)[len(request.prompt) - 1 :]
        assert same_bits(trained.cpu(), torch.tensor(sampled.log_probs))


def test_completions_do_not_depend_on_the_load(model):
    """The same prompt many times at temperature 0, while others come and go: one completion."""
    prompt, others = tokens_of(150).tolist(), mixed_requests(20, seed=2)
    same = [Request(prompt, 24, arrival=i) for i in range(30)]
    completions = engine(model, max_requests=32).run([*same, *others])
    assert len({tuple(completion.tokens) for completion in completions[:30]}) == 1


@pytest.mark.parametrize("operators", ["batch_invariant", "torch"])
def test_graphs_change_no_token_count_and_lose_nobody(operators, model):
    """Either set of operators, more requests than fit; logits close to those of a full pass."""
    chosen = model.with_operators(operators)
    requests = mixed_requests(20, seed=3)
    completions = engine(chosen, keep_logits=True, max_requests=6).run(requests)
    for request, got in zip(requests, completions, strict=True):
        assert len(got.tokens) == request.max_new_tokens
        tokens = torch.tensor([*request.prompt, *got.tokens])
        whole = chosen.logits(tokens).cpu()[len(request.prompt) - 1 : -1]
        assert relative_error(torch.stack(got.logits).float(), whole.float()) < 0.03


def test_stop_tokens_end_completions_that_the_gpu_is_ahead_of(model):
    free = engine(model).run([Request(tokens_of(40).tolist(), 30, temperature=1.5, seed=4)])[0].tokens
    stop = free[10]
    stopping = Request(tokens_of(40).tolist(), 30, temperature=1.5, seed=4, stop=[stop])
    requests = [stopping, *mixed_requests(12, seed=5)]
    got = engine(model, max_requests=3).run(requests)
    assert got[0].tokens == free[: free.index(stop) + 1]
    again = engine(model, max_requests=3).run(requests[1:])
    assert [c.tokens for c in got[1:]] == [c.tokens for c in again], (
        "a token launched too many disturbed its slot's heir"
    )


@pytest.mark.parametrize("precision", ["w8a8_int8", "w8a8_fp8"])
def test_eight_bit_projections_keep_their_bits_too(precision, model):
    pytest.importorskip("kernels.w8a8")
    chosen = model.with_operators("batch_invariant", precision)
    tokens = tokens_of(600)
    whole = chosen.logits(tokens)
    assert relative_error(whole, model.logits(tokens)) < 0.3
    for length in (1, 17, 65, 129, 300):
        difference = compare(chosen.logits(tokens[:length]), whole[:length])
        assert not difference.rows_differing, f"{length} tokens: {difference}"
    requests = mixed_requests(6, seed=6)
    for request, sampled in zip(requests, engine(chosen).run(requests), strict=True):
        tokens = torch.tensor([*request.prompt, *sampled.tokens])
        trained = chosen.token_log_probs(tokens)[len(request.prompt) - 1 :]
        assert same_bits(trained.cpu(), torch.tensor(sampled.log_probs))


def test_fp32_models_run_without_graphs():
    model = Llama.random(replace(MEDIUM, layers=1, vocab=1024), dtype=torch.float32)
    got = engine(model, keep_logits=True).run([Request([1, 2, 3], 4)])[0]
    whole = model.logits(torch.tensor([1, 2, 3, *got.tokens])).cpu()[2:-1]
    assert relative_error(torch.stack(got.logits), whole) < 1e-5


# --------------------------------------------------------------------------------------- negative control


def test_stock_operators_do_not_keep_a_tokens_bits(model):
    """What the rest of this file would see if it were blind: torch's own operators, prefixes against the whole."""
    chosen = model.with_operators("torch")
    tokens = tokens_of(1100)
    whole = chosen.logits(tokens)
    lengths = (1, 16, 17, 64, 129, 257, 513)
    differing = sum(compare(chosen.logits(tokens[:n]), whole[:n]).rows_differing for n in lengths)
    assert differing
