"""A Llama-3 decoder on the collection's kernels, and the same decoder on stock operators.

    x = embed[tokens]
    for every layer:  x += o(attention(rope(qkv(norm(x)))));  x += down(silu(gate) * up), gate and up of norm(x)
    logits = lm_head(norm(x))

A model is a `LlamaConfig`, `Weights` and a set of operators. The operators decide how a step is computed, never what:
`InvariantOperators` (ours), `EightBitOperators` (ours, projections in 8 bit) and `TorchOperators` (what PyTorch
ships). Tokens of any number of sequences go through one call of `Llama.forward`, described by a `Batch`: prefill, a
chunk of one, decode, or all of them mixed. Keys and values live in a paged `Cache`.

Why it is batch-invariant: every operator with a sum in it is; the rest (embedding, rotation, gate) work on one token
at a time. Where a token's keys lie, which chunk it came in and who else is in the batch is nothing they look at.

Attention kernels take 16-bit numbers. A model in fp32 goes through `attention_by_sequence`, plain torch, which is
there to compare loaders with and makes no promise about bits; so does every model on stock operators without a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.activation import silu_mul
from kernels.attention import attention_paged
from kernels.matmul import matmul
from kernels.norm import rms_norm
from kernels.rope import RopeScaling, rope_ref, rope_table, rope_to_cache
from kernels.softmax import log_softmax, token_log_softmax
from lab.checkpoint import Layer, LlamaConfig, Weights, empty_weights, load_weights, read_config

INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)

CONFIGS = {
    config.name: config
    for config in (
        LlamaConfig(
            "llama-3.1-8b",
            vocab=128_256,
            hidden=4096,
            layers=32,
            heads_q=32,
            heads_kv=8,
            head_dim=128,
            ffn=14_336,
            rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
            max_positions=131_072,
        ),
        LlamaConfig(
            "llama-3.2-1b",
            vocab=128_256,
            hidden=2048,
            layers=16,
            heads_q=32,
            heads_kv=8,
            head_dim=64,
            ffn=8192,
            rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
            max_positions=131_072,
            tied=True,
        ),
        LlamaConfig(
            "qwen3-0.6b",
            vocab=151_936,
            hidden=1024,
            layers=28,
            heads_q=16,
            heads_kv=8,
            head_dim=128,
            ffn=3072,
            eps=1e-6,
            rope_theta=1_000_000.0,
            max_positions=40_960,
            tied=True,
            qk_norm=True,
        ),
        LlamaConfig(
            "tiny",
            vocab=256,
            hidden=128,
            layers=2,
            heads_q=4,
            heads_kv=2,
            head_dim=64,
            ffn=256,
            rope_theta=10_000.0,
            max_positions=4096,
        ),
    )
}
"""Sizes as published with the models; `tiny` is for tests and for machines without a GPU."""


def random_weights(config: LlamaConfig, seed: int, dtype: torch.dtype, device: torch.device | str) -> Weights:
    """Weights of a trained model's scale, drawn on ``device``: its generator decides, so a GPU's differ from a CPU's.

    Projections have a standard deviation of 0.02; the two that write into the residual stream are smaller by the root
    of their number, so that the stream grows as it does at the start of training. Norms scatter around 1.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = empty_weights(config, dtype, device)

    def fill(x: torch.Tensor, scale: float, mean: float = 0.0) -> None:
        x.normal_(mean, scale, generator=generator)

    fill(weights.embed, 0.02)
    for layer in weights.layers:
        for matrix in (layer.qkv, layer.gate_up):
            fill(matrix, 0.02)
        for matrix in (layer.o, layer.down):
            fill(matrix, 0.02 / (2 * config.layers) ** 0.5)
        for norm in (layer.norm_1, layer.norm_2, layer.q_norm, layer.k_norm):
            if norm is not None:
                fill(norm, 0.1, mean=1.0)
    fill(weights.norm, 0.1, mean=1.0)
    if not config.tied:
        fill(weights.lm_head, 0.02)
    return weights


# ------------------------------------------------------------------------------------- batches and caches


@dataclass
class Batch:
    """Which tokens go through the model, where they stand in their sequences, and where those keep their keys.

    Tokens of a sequence lie side by side; padding comes after the last sequence, with slot -1. Sequence ``i`` owns
    the tokens from ``cu_q[i]`` to before ``cu_q[i + 1]`` and ``kv_lens[i]`` keys, those of its new tokens included.
    """

    tokens: torch.Tensor
    """(T,) int32."""
    positions: torch.Tensor
    """(T,) int32."""
    slots: torch.Tensor
    """(T,) int32: where in the cache a token's key and value go, page * page_size + offset; -1 for nowhere."""
    page_table: torch.Tensor
    """(B, pages of the longest) int32."""
    kv_lens: torch.Tensor
    """(B,) int32."""
    cu_q: torch.Tensor
    """(B + 1,) int32."""
    max_q: int
    """At least the most tokens of a sequence."""
    whole: bool = False
    """One sequence from its first token, without padding, in pages 0, 1, 2, ...: a short cut for stock attention."""


@dataclass
class Cache:
    """Keys and values of all layers: ``data`` is ``(layers, 2, pages, page_size, heads_kv, head_dim)``."""

    data: torch.Tensor

    @classmethod
    def new(
        cls, config: LlamaConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> Cache:
        """A cache with room for ``pages * page_size`` tokens, not written yet."""
        shape = (config.layers, 2, pages, page_size, config.heads_kv, config.head_dim)
        return cls(torch.empty(shape, dtype=dtype, device=device))

    @property
    def page_size(self) -> int:
        """Tokens a page holds."""
        return self.data.shape[3]

    def layer(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of layer ``i``, ``(pages, page_size, heads_kv, head_dim)`` each."""
        return self.data[i, 0], self.data[i, 1]


# ---------------------------------------------------------------------------------------------- operators


def attention_by_sequence(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """Attention in torch, one sequence at a time, its pages gathered: for fp32, and for stock operators on a CPU.

    Shapes as for ``kernels.attention.attention_paged``. Reads the lengths on the host, so no CUDA graph can hold it.
    """
    out = torch.zeros_like(q)
    starts, lens = batch.cu_q.tolist(), batch.kv_lens.tolist()
    for i, length in enumerate(lens):
        rows = slice(starts[i], starts[i + 1])
        q_len = rows.stop - rows.start
        if not q_len or not length:
            continue
        pages = batch.page_table[i, : -(-length // k_cache.shape[1])].long()
        k, v = (cache[pages].flatten(0, 1)[:length].transpose(0, 1) for cache in (k_cache, v_cache))
        query = length - q_len + torch.arange(q_len, device=q.device)
        visible = torch.arange(length, device=q.device) <= query[:, None]
        # torch's fused kernels may multiply fp32 numbers in TF32; its plain one does as it is told.
        with sdpa_kernel(SDPBackend.MATH) if q.dtype == torch.float32 else nullcontext():
            mixed = F.scaled_dot_product_attention(q[rows].transpose(0, 1), k, v, attn_mask=visible, enable_gqa=True)
        out[rows] = mixed.transpose(0, 1)
    return out


class InvariantOperators:
    """The collection's kernels. A projection may take more than a tensor: see ``norm``, ``gate``, ``enter``."""

    name = "batch_invariant"

    def prepare(self, weight: torch.Tensor):
        """A projection ``(out, in)`` in the form that ``linear`` takes."""
        return weight.t()

    def enter(self, x: torch.Tensor):
        """What ``linear`` takes, from a tensor."""
        return x

    def linear(self, x, weight) -> torch.Tensor:
        """``x`` (T, in) through a prepared projection."""
        return matmul(x, weight)

    def norm(self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float):
        """RMSNorm of ``x + residual``, as ``linear`` takes it, and that sum."""
        return (rms_norm(x, weight, eps), x) if residual is None else rms_norm(x, weight, eps, residual=residual)

    def gate(self, gate_up: torch.Tensor):
        """``silu(gate) * up``, as ``linear`` takes it."""
        return silu_mul(gate_up)

    def last_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm of ``x + residual`` for the LM head, which keeps the model's dtype."""
        return rms_norm(x, weight, eps, residual=residual)[0]

    def head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``x`` (T, hidden) through the LM head, ``weight`` being ``(hidden, vocab)``."""
        return matmul(x, weight)

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """fp32, shape of ``logits``."""
        return log_softmax(logits)

    def token_log_softmax(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Log-softmax of one column a row: (T,) fp32."""
        return token_log_softmax(logits, ids)

    def rope(self, qkv, table, batch: Batch, k_cache, v_cache, layer: Layer, eps: float) -> torch.Tensor:
        """Queries (T, heads_q, head_dim), rotated; keys and values go into the cache."""
        weights = {"q_weight": layer.q_norm, "k_weight": layer.k_norm}
        return rope_to_cache(qkv, table, batch.positions, batch.slots, k_cache, v_cache, **weights, eps=eps)

    def attention(self, batch: Batch, cache: Cache):
        """The function ``(q, k_cache, v_cache) -> (T, heads_q, head_dim)`` for one pass over ``batch``."""
        if cache.data.element_size() == 4:
            return partial(attention_by_sequence, batch=batch)
        b = batch
        where = (b.page_table, b.kv_lens, b.cu_q, b.max_q)  # made by this package: not looked at once a layer
        return lambda q, k_cache, v_cache: attention_paged(q, k_cache, v_cache, *where, validate=False)


class EightBitOperators(InvariantOperators):
    """Ours with projections in 8 bit: activations quantised per token, weights per output channel.

    The LM head, the norms and attention keep the model's dtype.
    """

    def __init__(self, precision: str):
        from kernels import quant, w8a8

        self.name = f"batch_invariant {precision}"
        self.dtype = {"w8a8_int8": torch.int8, "w8a8_fp8": torch.float8_e4m3fn}[precision]
        self.quant, self.w8a8 = quant, w8a8

    def prepare(self, weight: torch.Tensor):
        quantised, scale = self.quant.per_channel_quant(weight, self.dtype)
        return quantised.t(), scale, weight.dtype

    def enter(self, x: torch.Tensor):
        return self.quant.per_token_quant(x, self.dtype)

    def linear(self, x, weight) -> torch.Tensor:
        return self.w8a8.w8a8_matmul(x[0], weight[0], x[1], weight[1], out_dtype=weight[2])

    def norm(self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float):
        made = self.quant.rms_norm_per_token_quant(x, weight, eps, self.dtype, residual=residual)
        return made[:2], (x if residual is None else made[2])

    def gate(self, gate_up: torch.Tensor):
        return self.quant.silu_mul_per_token_quant(gate_up, self.dtype)


FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""In which order stock operators try torch's attention backends."""


class TorchOperators(InvariantOperators):
    """What PyTorch ships: torch.mm, F.rms_norm, SiLU and product, and its fastest attention for each case.

    A whole prompt goes through F.scaled_dot_product_attention (cuDNN, else FlashAttention). Decode and chunks go
    through the FlashAttention that SDPA dispatches to, called with the lengths of every sequence, which SDPA itself
    has no argument for. It wants a sequence's keys in one stretch, so page tables must count upwards: the engine
    keeps them so for these operators. PyTorch has no fused rotation: on a GPU it borrows ours, which adds nothing up.
    """

    name = "torch"

    def linear(self, x, weight) -> torch.Tensor:
        return torch.mm(x, weight)

    head = linear

    def norm(self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float):
        total = x if residual is None else x + residual
        return F.rms_norm(total, weight.shape, weight, eps), total

    def last_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x + residual, weight.shape, weight, eps)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits.float(), dim=-1)

    def token_log_softmax(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.log_softmax(logits).gather(1, ids[:, None])[:, 0]

    def rope(self, qkv, table, batch: Batch, k_cache, v_cache, layer: Layer, eps: float) -> torch.Tensor:
        if qkv.is_cuda:
            return super().rope(qkv, table, batch, k_cache, v_cache, layer, eps)
        heads_kv, head_dim = k_cache.shape[2:]
        heads = qkv.unflatten(1, (-1, head_dim))
        q, k, v = heads.split((heads.shape[1] - 2 * heads_kv, heads_kv, heads_kv), dim=1)
        if layer.q_norm is not None:
            q, k = (F.rms_norm(x, (head_dim,), w, eps) for x, w in ((q, layer.q_norm), (k, layer.k_norm)))
        q, k = (rope_ref(x, table, batch.positions).to(qkv.dtype) for x in (q, k))
        used = batch.slots >= 0
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache.view(-1, heads_kv, head_dim)[batch.slots[used].long()] = new[used]
        return q

    def attention(self, batch: Batch, cache: Cache):
        if not cache.data.is_cuda or cache.data.element_size() == 4:
            return partial(attention_by_sequence, batch=batch)
        length = len(batch.tokens)
        if batch.whole:

            def whole(q, k_cache, v_cache):
                q, k, v = (x.view(-1, *x.shape[-2:])[:length].transpose(0, 1)[None] for x in (q, k_cache, v_cache))
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

            return whole
        starts = F.pad(batch.page_table[:, 0] * cache.page_size, (0, 1))
        capacity = batch.page_table.shape[1] * cache.page_size
        flash = torch.ops.aten._flash_attention_forward

        def by_lengths(q, k_cache, v_cache):
            k, v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
            lengths = (batch.cu_q, starts, batch.max_q, capacity)
            return flash(q, k, v, *lengths, 0.0, True, False, seqused_k=batch.kv_lens)[0]

        return by_lengths


PRECISIONS = ("16-bit", "w8a8_int8", "w8a8_fp8")


def make_operators(operators: str, precision: str = "16-bit") -> InvariantOperators:
    """``"batch_invariant"`` or ``"torch"``; in ``"16-bit"`` (the model's own dtype, fp32 included) or 8 bit.

    Raises:
        ValueError: another name, or 8 bit on stock operators.
    """
    known = {"batch_invariant": InvariantOperators, "torch": TorchOperators}
    if operators not in known:
        raise ValueError(f"operators must be one of {list(known)}, got operators={operators!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got precision={precision!r}")
    if precision == "16-bit":
        return known[operators]()
    if operators == "torch":
        raise ValueError(f"precision={precision!r} is there for operators='batch_invariant' only")
    return EightBitOperators(precision)


# -------------------------------------------------------------------------------------------------- model


@dataclass
class Projections:
    """A layer's matrices as the operators take them."""

    qkv: object
    o: object
    gate_up: object
    down: object


class Llama:
    """A decoder: ``forward`` takes a `Batch` to hidden states, ``head`` those to logits."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        operators: str = "batch_invariant",
        precision: str = "16-bit",
        max_positions: int | None = None,
    ):
        """Weights are shared with other models made from them, except in 8 bit, which makes its own.

        Args:
            operators, precision: as for ``make_operators``.
            max_positions: positions to prepare rotations for; those of the model, at most 32768, if not given.

        Raises:
            ValueError: operators or precision unknown; more positions than the model has.
        """
        self.config, self.weights = config, weights
        self.operators, self.precision = make_operators(operators, precision), precision
        self.dtype, self.device = weights.embed.dtype, weights.embed.device
        self.max_positions = max_positions or min(config.max_positions, 32_768)
        if self.max_positions > config.max_positions:
            raise ValueError(f"max_positions={max_positions}, but {config.name} has {config.max_positions}")
        self.table = rope_table(
            self.max_positions, config.head_dim, config.rope_theta, config.rope_scaling, self.device
        )
        prepare = self.operators.prepare
        self.projections = [
            Projections(prepare(layer.qkv), prepare(layer.o), prepare(layer.gate_up), prepare(layer.down))
            for layer in weights.layers
        ]
        self.lm_head = weights.lm_head.t()

    @classmethod
    def random(
        cls,
        config: str | LlamaConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        **options: object,
    ) -> Llama:
        """A model with random weights, of a named configuration or one of your own; ``options`` as for ``Llama``.

        Raises:
            ValueError: an unknown name.
        """
        if isinstance(config, str):
            if config not in CONFIGS:
                raise ValueError(f"config must be one of {list(CONFIGS)}, got config={config!r}")
            config = CONFIGS[config]
        return cls(config, random_weights(config, seed, dtype, device), **options)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
        **options: object,
    ) -> Llama:
        """A Hugging Face checkpoint from a local folder, in the dtype it was saved in unless another is given.

        Raises:
            CheckpointError: see ``lab.checkpoint``.
        """
        config, saved = read_config(folder)
        return cls(config, load_weights(folder, config, dtype or saved, device), **options)

    def with_operators(self, operators: str, precision: str = "16-bit") -> Llama:
        """The same weights on other operators."""
        return Llama(self.config, self.weights, operators, precision, self.max_positions)

    def new_cache(self, pages: int, page_size: int) -> Cache:
        """A cache of this model's shape, dtype and device."""
        return Cache.new(self.config, pages, page_size, self.dtype, self.device)

    @sdpa_kernel(FASTEST_FIRST, set_priority=True)
    def forward(self, batch: Batch, cache: Cache) -> torch.Tensor:
        """Hidden states (T, hidden) after the last norm; keys and values of the tokens are in the cache afterwards.

        Nothing waits for the device, so a CUDA graph can hold it (fp32 models aside).
        """
        ops, eps = self.operators, self.config.eps
        attend = ops.attention(batch, cache)
        x, residual = F.embedding(batch.tokens, self.weights.embed), None
        for i, (layer, project) in enumerate(zip(self.weights.layers, self.projections, strict=True)):
            keys, values = cache.layer(i)
            normed, residual = ops.norm(x, residual, layer.norm_1, eps)
            q = ops.rope(ops.linear(normed, project.qkv), self.table, batch, keys, values, layer, eps)
            mixed = attend(q, keys, values).flatten(1)
            x = ops.linear(ops.enter(mixed), project.o)
            normed, residual = ops.norm(x, residual, layer.norm_2, eps)
            x = ops.linear(ops.gate(ops.linear(normed, project.gate_up)), project.down)
        return ops.last_norm(x, residual, self.weights.norm, eps)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (T, vocab), in the model's dtype."""
        return self.operators.head(hidden, self.lm_head)

    def sequence(self, tokens: torch.Tensor, page_size: int = 64) -> tuple[Batch, Cache]:
        """A batch of one whole sequence ``tokens`` (T,), and a fresh cache for it.

        Raises:
            ValueError: no tokens, or more than the model has positions for, or some that are none of its vocabulary.
        """
        if tokens.ndim != 1 or tokens.dtype not in INTEGERS:
            shape = tuple(tokens.shape)
            raise ValueError(f"tokens must be integers of one axis, got tokens.dtype={tokens.dtype}, {shape=}")
        low, high = tokens.aminmax() if len(tokens) else (0, 0)
        if low < 0 or high >= self.config.vocab:
            wrong = int(low if low < 0 else high)
            raise ValueError(f"tokens hold {wrong}, outside the vocabulary of {self.config.vocab}")
        length = len(tokens)
        if not 1 <= length <= self.max_positions:
            raise ValueError(f"a sequence must have 1 to {self.max_positions} tokens, got {length}")
        pages = -(-length // page_size)
        index = torch.arange(max(length, pages), dtype=torch.int32, device=self.device)
        lens = torch.full((1,), length, dtype=torch.int32, device=self.device)
        batch = Batch(
            tokens=tokens.to(self.device, torch.int32),
            positions=index[:length],
            slots=index[:length],
            page_table=index[None, :pages].contiguous(),
            kv_lens=lens,
            cu_q=F.pad(lens, (1, 0)),
            max_q=length,
            whole=True,
        )
        return batch, self.new_cache(pages, page_size)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (T, vocab) of one whole sequence ``tokens`` (T,), in one forward pass."""
        return self.head(self.forward(*self.sequence(tokens)))

    def token_log_probs(self, tokens: torch.Tensor, rows: int = 1024) -> torch.Tensor:
        """Log-probability of every token given those before it, from one forward pass: (T - 1,) fp32.

        Logits are made ``rows`` tokens at a time, which bounds memory.
        """
        hidden, ids = self.forward(*self.sequence(tokens))[:-1], tokens.to(self.device, torch.int64)[1:]
        parts = [
            self.operators.token_log_softmax(self.head(some_hidden), some_ids)
            for some_hidden, some_ids in zip(hidden.split(rows), ids.split(rows), strict=True)
        ]
        return torch.cat(parts)


# ---------------------------------------------------------------------------------------------- reference


def llama_ref(config: LlamaConfig, weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """The decoder in plain torch without a cache, in the dtype of ``weights``: what a model is measured against
    (in float64), and what gradients flow through.

    Args:
        tokens: ``(sequences, length)``.

    Returns:
        logits ``(sequences, length, vocab)``.
    """
    c, dtype = config, weights.embed.dtype
    length = tokens.shape[1]
    table = rope_table(length, c.head_dim, c.rope_theta, c.rope_scaling, tokens.device)
    table = table.to(torch.promote_types(dtype, torch.float32))[None, :, None]
    cos, sin = table.chunk(2, dim=-1)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, c.eps)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        low, high = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(dtype)

    x = F.embedding(tokens, weights.embed)
    for layer in weights.layers:
        heads = F.linear(norm(x, layer.norm_1), layer.qkv).unflatten(-1, (-1, c.head_dim))
        q, k, v = heads.split((c.heads_q, c.heads_kv, c.heads_kv), dim=2)
        if c.qk_norm:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q), rotate(k), v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), layer.o)
        gate, up = F.linear(norm(x, layer.norm_2), layer.gate_up).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, layer.down)
    return F.linear(norm(x, weights.norm), weights.lm_head)
