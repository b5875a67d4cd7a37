"""The bookkeeping of a serving step on the device: where each token stands and goes, and what the step leaves behind.

A *slot* is the place a sequence has from its first step to its last: a row of ``state`` and an entry of ``lengths``
and ``last_token``. A *row* is its place in one step's batch; ``rows`` names the slot of each, -1 for padding. So a
step that decodes needs nothing from the host but ``rows``, and that only when sequences come or go.

Shapes: ``state`` is ``(slots, HEADER + max_pages)`` int32: the seed's low and high half, the bits of temperature and
top-p, then the sequence's page table. Batch-invariant because nothing is computed from more than one sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEADER = 4
"""Entries of ``state`` before the page table."""

BLOCK = 128


@triton.jit(do_not_specialize=["n_rows", "n_tokens"])
def _place_kernel(
    rows_ptr,
    cu_q_ptr,
    starts_ptr,
    state_ptr,
    lengths_ptr,
    last_token_ptr,
    tokens_ptr,
    positions_ptr,
    slots_ptr,
    page_table_ptr,
    kv_lens_ptr,
    last_ptr,
    temperature_ptr,
    top_p_ptr,
    seed_ptr,
    n_rows,
    n_tokens,
    max_pages,
    PAGE_SIZE: tl.constexpr,
    DECODE: tl.constexpr,
    HEADER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    first = tl.load(cu_q_ptr + row)
    slot = tl.full((), -1, tl.int32)
    end = n_tokens  # the program after the last row clears the padding
    if row < n_rows:
        slot = tl.load(rows_ptr + row)
        end = tl.load(cu_q_ptr + row + 1)
    if slot >= 0:
        state_ptr += slot.to(tl.int64) * (HEADER + max_pages)
        if DECODE:
            start = tl.load(lengths_ptr + slot)
            tl.store(tokens_ptr + row, tl.load(last_token_ptr + slot))
        else:
            start = tl.load(starts_ptr + row)
        for at in range(first, end, BLOCK):
            mask = at + offs < end
            position = start + at - first + offs
            page = tl.load(state_ptr + HEADER + position // PAGE_SIZE, mask=mask, other=0)
            tl.store(positions_ptr + at + offs, position, mask=mask)
            tl.store(slots_ptr + at + offs, page * PAGE_SIZE + position % PAGE_SIZE, mask=mask)
        kv_len = start + end - first
        pages = tl.cdiv(kv_len, PAGE_SIZE)
        for at in range(0, pages, BLOCK):
            mask = at + offs < pages
            page = tl.load(state_ptr + HEADER + at + offs, mask=mask, other=0)
            tl.store(page_table_ptr + row.to(tl.int64) * max_pages + at + offs, page, mask=mask)
        low = tl.load(state_ptr).to(tl.int64) & 0xFFFFFFFF
        tl.store(seed_ptr + row, (tl.load(state_ptr + 1).to(tl.int64) << 32) | low)
        tl.store(temperature_ptr + row, tl.load(state_ptr + 2).to(tl.float32, bitcast=True))
        tl.store(top_p_ptr + row, tl.load(state_ptr + 3).to(tl.float32, bitcast=True))
        tl.store(kv_lens_ptr + row, kv_len)
        tl.store(last_ptr + row, end - 1)
    else:
        for at in range(first, end, BLOCK):
            mask = at + offs < end
            tl.store(tokens_ptr + at + offs, tl.zeros((BLOCK,), tl.int32), mask=mask)
            tl.store(positions_ptr + at + offs, tl.zeros((BLOCK,), tl.int32), mask=mask)
            tl.store(slots_ptr + at + offs, tl.full((BLOCK,), -1, tl.int32), mask=mask)
        if row < n_rows:
            tl.store(page_table_ptr + row.to(tl.int64) * max_pages, 0)
            tl.store(kv_lens_ptr + row, 0)
            tl.store(last_ptr + row, 0)
            tl.store(seed_ptr + row, tl.zeros((), tl.int64))
            tl.store(temperature_ptr + row, 0.0)
            tl.store(top_p_ptr + row, 1.0)


@triton.jit(do_not_specialize=["n_rows"])
def _finish_kernel(
    rows_ptr,
    kv_lens_ptr,
    ids_ptr,
    log_probs_ptr,
    lengths_ptr,
    last_token_ptr,
    result_ptr,
    n_rows,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < n_rows
    slot = tl.load(rows_ptr + row, mask=mask, other=-1)
    token = tl.load(ids_ptr + row, mask=mask, other=0).to(tl.int32)
    log_prob = tl.load(log_probs_ptr + row, mask=mask, other=0.0)
    tl.store(result_ptr + 2 * row, token, mask=mask)
    tl.store(result_ptr + 2 * row + 1, log_prob.to(tl.int32, bitcast=True), mask=mask)
    kv_len = tl.load(kv_lens_ptr + row, mask=mask, other=0)
    tl.store(lengths_ptr + slot, kv_len, mask=slot >= 0)
    tl.store(last_token_ptr + slot, token, mask=slot >= 0)


def place_tokens(
    rows: torch.Tensor,
    cu_q: torch.Tensor,
    starts: torch.Tensor | None,
    state: torch.Tensor,
    lengths: torch.Tensor,
    last_token: torch.Tensor,
    page_size: int,
    *,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    last: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
) -> None:
    """Fill in the metadata of a step, before the model runs.

    Args:
        rows: ``(B,)`` int32 slots, -1 for padding, which comes last.
        cu_q: ``(B + 1,)`` int32, where each row's tokens begin. Tokens past the last row are padding too.
        starts: ``(B,)`` int32, keys that each row has already; ``None`` for decoding: ``lengths`` says so, and the
            one token of a row is its slot's ``last_token``.
        state: ``(slots, HEADER + max_pages)`` int32, see above.
        lengths, last_token: ``(slots,)`` int32.
        page_size: tokens a page holds.
        tokens, positions, slots: ``(T,)`` int32, written: position and cache slot of every token (0 and -1 for
            padding); ``tokens`` only when decoding, and where there is padding.
        page_table, kv_lens, last: ``(B, max_pages)``, ``(B,)``, ``(B,)`` int32, written: pages in use, keys including
            the step's own, index of each row's last token. Padding has no keys.
        temperature, top_p, seed: ``(B,)`` fp32, fp32, int64, written.
    """
    n_rows = len(rows)
    _place_kernel[(n_rows + 1,)](
        rows,
        cu_q,
        starts,
        state,
        lengths,
        last_token,
        tokens,
        positions,
        slots,
        page_table,
        kv_lens,
        last,
        temperature,
        top_p,
        seed,
        n_rows,
        len(tokens),
        page_table.shape[1],
        PAGE_SIZE=page_size,
        DECODE=starts is None,
        HEADER=HEADER,
        BLOCK=BLOCK,
        num_warps=1,
    )


def finish_step(
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    lengths: torch.Tensor,
    last_token: torch.Tensor,
    result: torch.Tensor,
) -> None:
    """Hand a step's tokens to the slots of its rows, and to ``result``, which the host copies.

    Args:
        rows, kv_lens: ``(B,)`` int32, as ``place_tokens`` had them and left them.
        ids, log_probs: ``(B,)`` int64 and fp32, what was sampled.
        lengths, last_token: ``(slots,)`` int32, written.
        result: ``(B, 2)`` int32, written: token, bits of its log-probability.
    """
    n_rows = len(rows)
    _finish_kernel[(triton.cdiv(n_rows, BLOCK),)](
        rows, kv_lens, ids, log_probs, lengths, last_token, result, n_rows, BLOCK=BLOCK, num_warps=1
    )
