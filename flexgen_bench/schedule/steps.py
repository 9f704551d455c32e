"""The unit of work: one step on one lane, with the buffers it reads and writes."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from flexgen_bench.core.tiers import Lane
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.micro_batch import NO_MICRO_BATCH, MicroBatch

TOKEN_BYTES = 8  # of a token's number, as operators take it


class StepKind(StrEnum):
    """What a step does. The engine has one action per kind; the lane says where it happens."""

    LOAD_WEIGHTS = "load_weights"  # a unit's blob, one tier up
    DEQUANTIZE = "dequantize"  # a unit's compressed weights, unpacked once for all micro-batches of a pass
    GATHER_ROWS = "gather_rows"  # embedding rows of the tokens, from where the table lies
    MOVE_ROWS = "move_rows"  # gathered rows, cpu -> gpu
    EMBED = "embed"  # rows -> hidden states
    LOAD_HIDDEN = "load_hidden"  # a part of the hidden states, one tier up
    STORE_HIDDEN = "store_hidden"  # a part of the hidden states, one tier down
    PROJECT = "project"  # hidden -> q, k, v
    MOVE_QKV = "move_qkv"  # q, k, v of one token, gpu -> cpu
    LOAD_KV = "load_kv"  # a KV part, one tier up
    ATTEND = "attend"  # attention of one part (decode) or of all parts (prefill)
    MOVE_ATTENTION = "move_attention"  # attention output, cpu -> gpu
    STORE_KV = "store_kv"  # new keys and values, one tier down
    APPEND_KV = "append_kv"  # one token's keys and values into the cpu part of the cache
    OUTPUT = "output"  # attention output -> output projection, MLP -> hidden
    LAYER = "layer"  # PROJECT, ATTEND and OUTPUT of a resident micro-batch that decodes, in one
    LOAD_EXPERTS = "load_experts"  # of a layer's experts those that a micro-batch touches, one tier up
    MOVE_ROUTED = "move_routed"  # what experts read, and which of them, to where they are computed
    EXPERTS = "experts"  # experts placed apart from their layer, after its OUTPUT -> hidden
    MOVE_EXPERTS = "move_experts"  # what experts made elsewhere, back to their layer
    ADD_EXPERTS = "add_experts"  # the same -> hidden
    HEAD = "head"  # hidden -> logits
    MOVE_LOGITS = "move_logits"  # what sampling needs, gpu -> cpu
    SAMPLE = "sample"  # logits -> next tokens: where the logits are, or on the host
    MOVE_TOKENS = "move_tokens"  # next tokens, gpu -> cpu; cpu -> gpu where the host has sampled them
    RECV_HIDDEN = "recv_hidden"  # hidden states of the rank before, into host memory
    MOVE_RECEIVED = "move_received"  # the same, cpu -> gpu
    ENTER = "enter"  # the same -> hidden, where the rank's first layer is computed
    LEAVE = "leave"  # hidden -> what the next rank is sent
    MOVE_LEAVING = "move_leaving"  # the same, gpu -> cpu
    SEND_HIDDEN = "send_hidden"  # the same, to the next rank
    SEND_TOKENS = "send_tokens"  # next tokens, from the last rank to all others
    RECV_TOKENS = "recv_tokens"  # the same, on each of the others
    MOVE_PARTIAL = "move_partial"  # a rank's part of a sum over all that share a layer, gpu -> cpu
    REDUCE = "reduce"  # the sum, on every rank
    MOVE_REDUCED = "move_reduced"  # the same, cpu -> gpu
    MLP = "mlp"  # of a layer that ranks share: the sum behind its attention -> MLP, a part of the next sum
    ADD = "add"  # the last sum of a layer -> hidden


class Step(NamedTuple):
    """One unit of work. (A tuple: hundreds of thousands are made in a search for a policy.)

    unit: 0 = embedding, 1..L = decoder layers, L+1 = head, beyond that experts that are placed apart. micro_batch: the
    one it belongs to; NO_MICRO_BATCH for steps on a unit's weights, which serve all of them. part: which span of the
    micro-batch's sequences, -1 for all; of weights, which piece, -1 if they are loaded as one; of touched experts,
    which of the pass's loads into their buffer. weight_buffer: staging buffer of the weights (-1: in place).
    dequantized_buffer: that of the unpacked weights, where compressed ones are unpacked by a step of their own (-1:
    they are not). bytes moved over the lane's link (of touched experts, as many as may be expected until they are
    known); flops on a compute lane (2 per multiply-add).
    """

    lane: Lane
    kind: StepKind
    unit: int
    micro_batch: MicroBatch = NO_MICRO_BATCH
    part: int = -1
    weight_buffer: int = -1
    dequantized_buffer: int = -1
    reads: tuple[Buffer, ...] = ()
    writes: tuple[Buffer, ...] = ()
    bytes: int = 0
    flops: int = 0

    @property
    def on_weights(self) -> bool:
        """Whether it belongs to no micro-batch: it loads or unpacks the weights that all of them use."""
        return self.micro_batch is NO_MICRO_BATCH

    @property
    def micro_batch_index(self) -> int:
        """Number of the micro-batch in its pass, -1 for weights."""
        return self.micro_batch.index

    @property
    def buffer_index(self) -> int:
        """Staging buffer of the micro-batch's own data (rows, hidden states, q/k/v, attention)."""
        return self.micro_batch.buffer_index

    @property
    def token(self) -> int:
        """0 in prefill, n when the n-th token after the prompt is fed (n >= 1)."""
        return self.micro_batch.token
