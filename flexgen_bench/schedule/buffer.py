"""What steps read and write.

Two kinds of buffers. A *home* is where something lives between passes: the weights of a unit, the KV cache and the
hidden states of a KV slot's sequence group. A *staging buffer* holds what is on its way or being worked on; there are a
few of each, numbered and used in turn, so a step that takes one again depends on all that used it before. Most staging
buffers belong to a micro-batch (``MicroBatch.buffer_index``), the others to a unit's weights, to a part of the cache
that is being moved (``Part.kv_buffer``), or to the prompts of a sequence group (``MicroBatch.prompt_buffer``).

Names, what keys them, what they hold, and which steps write them. ``site`` in a name is the site that the buffer lies
on, of which there may be several (``gpu``, ``cpu``, ``gpu:1``); the others are told apart by their numbers, also where
a schedule is of several devices.

===============================  ===================================================  =============================
homes
resident(unit)                   a unit's weights
hidden(KV slot, chunk, part)     hidden states                                        STORE_HIDDEN; EMBED, OUTPUT,
                                                                                      LAYER, EXPERTS, ADD_EXPERTS
                                                                                      where they live
kv(KV slot, layer, part)         keys and values                                      ATTEND, LAYER, STORE_KV, APPEND_KV
kv_tail(KV slot, layer, part)    the unfinished segment of a cache on disk, in        ATTEND, APPEND_KV
                                 host memory
tokens(KV slot)                  the next tokens of its sequence group, where the     SAMPLE, MOVE_TOKENS
                                 embedding reads them
-------------------------------  ---------------------------------------------------  -----------------------------
weights
weights.site(buffer, piece)      a unit's weights, brought to where they are used     LOAD_WEIGHTS; LOAD_EXPERTS
dequantized(buffer)              the same unpacked                                    DEQUANTIZE
-------------------------------  ---------------------------------------------------  -----------------------------
of a micro-batch
rows, gpu_rows                   gathered embedding rows                              GATHER_ROWS, MOVE_ROWS
x.site                           hidden states being worked on                        EMBED, LOAD_HIDDEN, OUTPUT,
                                                                                      LAYER, EXPERTS, ADD_EXPERTS
qkv, attn(part)                  around the attention                                 PROJECT, ATTEND
residual                         hidden states before it, for OUTPUT; before experts  PROJECT; OUTPUT, LAYER, MLP
                                 that are placed apart, or what a sum is added to,
                                 for what adds to them
routed                           what experts read, and which of them                 OUTPUT, LAYER
routed.site, added, added.site   the same where experts are computed away from their  MOVE_ROUTED, EXPERTS,
                                 layer, and what they make                            MOVE_EXPERTS
kv_token(part)                   a new token's keys and values on their way home      ATTEND
logits                           what sampling needs                                  HEAD
inbox, arrived                   hidden states of the rank before: in host memory,    RECV_HIDDEN, MOVE_RECEIVED
                                 on the accelerator
leaving, outbox                  what goes to the next rank: where it was computed,   LEAVE, MOVE_LEAVING
                                 in host memory
partial, reduced                 of a layer that ranks share, on an accelerator: a    OUTPUT, MLP; MOVE_REDUCED
                                 rank's part of a sum, and the sum
sum                              both, in host memory                                 OUTPUT, MLP, MOVE_PARTIAL; REDUCE
new_tokens                       next tokens on their way across a link               SAMPLE
..._host(part), host_logits      the same on the other side of a link                 MOVE_..., STORE_KV
-------------------------------  ---------------------------------------------------  -----------------------------
of the cache
kv_moved, kv_host                a part's keys and values, moved to an accelerator    LOAD_KV
                                 or read from disk
kv_new.site, kv_new_host         prompts' keys and values on their way home           ATTEND, STORE_KV
===============================  ===================================================  =============================
"""

from __future__ import annotations

from typing import NamedTuple


class Buffer(NamedTuple):
    """A named piece of memory. key: the KV slot, unit or number of the staging buffer that it is of."""

    name: str
    key: int = 0
    layer: int = 0
    part: int = 0
