"""The formulas of a decoder's parts. N tokens, H query heads, G KV heads, D head dim.

``ops`` is ``flexgen_bench.kernels.ops``, or another set of kernels with its names: passing it in keeps torch out of
this package. ``w`` are a unit's weights under the names of ``inventory.py``: tensors, or what ``ops.linear`` takes in
their place. Formulas are traced (``kernels/formula.py``): what operators give is indexed, not unpacked, since torch.fx
unpacks by looking at the frames of its callers, which then refer to themselves and hold a job's memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexgen_bench.models.parts import MLP, Attention, Decoder, Experts, Layer, Norm, NormKind, NormPlace, Scoring

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, Any]


def rows(decoder: Decoder, token_ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Which row of each table every token needs: table name -> (N,) indices."""
    indices = {"tokens": token_ids}
    if decoder.embedding.positions:
        indices = {"positions": positions + decoder.embedding.offset, **indices}
    return indices


def embed(ops: Any, decoder: Decoder, w: Weights, gathered: Weights) -> Tensor:
    """Gathered rows (table name -> (N, width)) -> hidden states (N, hidden)."""
    x, embedding = gathered["tokens"], decoder.embedding
    if "project_in" in w:
        x = ops.linear(x, w["project_in"])
    if embedding.scale != 1.0:
        x = ops.scaled(x, embedding.scale)
    if embedding.positions:
        x = x + gathered["positions"]
    return x if embedding.norm is None else norm(ops, embedding.norm, w, "embedding_norm", x)


def angles(ops: Any, decoder: Decoder, positions: Tensor, lengths: Tensor, like: Tensor) -> Any:
    """cos and sin of each of the decoder's rotaries for tokens at positions (N,): made once per pass, in the dtype of
    ``like``.

    lengths: (N,) of the tokens' sequences when they are computed."""
    return tuple(
        ops.rotary_table(positions, lengths, r.dim, r.theta, r.scaling, like.dtype, r.interleaved)
        for r in decoder.rotaries
    )


def project(
    ops: Any, decoder: Decoder, layer: Layer, w: Weights, x: Tensor, tables: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden (N, hidden) -> q (N, H, D), k (N, G, D), v (N, G, D), rotated by ``tables``, which are what ``angles``
    returned."""
    attention = layer.attention
    if layer.place is NormPlace.BEFORE:
        x = norm(ops, layer.attention_norm, w, "attention_norm", x)
    qkv = ops.linear(x, w["qkv.weight"], w.get("qkv.bias"))
    if attention.rotary is not None and attention.rotates_together:
        table, interleaved = tables[attention.rotary], decoder.rotaries[attention.rotary].interleaved
        sizes, dim = (attention.heads + attention.kv_heads, attention.kv_heads), attention.head_dim
        halves = qkv.view(-1, sum(sizes), dim).split(sizes, 1)
        qk = ops.rotate(halves[0], table[0], table[1], interleaved)
        qk = qk.split((attention.heads, attention.kv_heads), 1)
        return qk[0], qk[1], halves[1]
    q, k, v = _heads(attention, qkv)
    if attention.qk_norm is not None:
        q = norm(ops, attention.qk_norm, w, "q_norm", q)
        k = norm(ops, attention.qk_norm, w, "k_norm", k)
    if attention.rotary is not None:
        rotary = decoder.rotaries[attention.rotary]
        table = tables[attention.rotary]
        q = ops.rotate(q, table[0], table[1], rotary.interleaved)
        k = ops.rotate(k, table[0], table[1], rotary.interleaved)
    return q, k, v


def _heads(attention: Attention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the fused projection gives (N, rows) -> q (N, H, D), k (N, G, D), v (N, G, D)."""
    sizes, dim, blocks = attention.heads_per_block, attention.head_dim, attention.blocks
    q, k, v = attention.places
    if blocks == 1:
        parts = qkv.view(-1, sum(sizes), dim).split(sizes, 1)
    else:
        block_parts = qkv.view(-1, blocks, sum(sizes), dim).split(sizes, 2)
        parts = [block_parts[i].reshape(-1, blocks * size, dim) for i, size in enumerate(sizes)]
    return parts[q], parts[k], parts[v]


def output(ops: Any, layer: Layer, w: Weights, x: Tensor, attended: Tensor) -> Tensor:
    """Hidden before the layer (N, hidden) and attention output (N, H * D) -> hidden after the layer. Of a mixture of
    experts: ``routed``, ``ops.through_experts`` and ``after_mlp``, of which the middle one depends on values."""
    if isinstance(layer.mlp, Experts):
        dense, of_experts = apart(w)
        x, read, chosen, shares, *shared = routed(ops, layer, dense, x, attended)
        each = [functools.partial(mlp, ops, layer.mlp.expert, own) for own in of_experts]
        return after_mlp(ops, layer, dense, x, ops.through_experts(read, chosen, shares, each), *shared)
    state = after_attention(ops, layer, w, x, attended)
    return after_mlp(ops, layer, w, state[0], mlp(ops, layer.mlp, w, state[1]))


def apart(w: Weights) -> tuple[Weights, list[dict[str, Any]]]:
    """A layer's weights: those that every token meets, and of each expert its own, by their names in an MLP."""
    dense: dict[str, Any] = {}
    each: dict[int, dict[str, Any]] = {}
    for name, weight in w.items():
        if name.startswith("experts."):
            _, number, own = name.split(".", 2)
            each.setdefault(int(number), {})[own] = weight
        else:
            dense[name] = weight
    return dense, [each[number] for number in range(len(each))]


def routed(ops: Any, layer: Layer, w: Weights, x: Tensor, attended: Tensor) -> tuple[Tensor, ...]:
    """Hidden before the layer (N, hidden) and attention output (N, H * D) -> the residual stream, what experts read
    (N, hidden), of each token the numbers of its experts and what these weigh (N, top_k), and if there is a shared MLP
    what it makes."""
    state = after_attention(ops, layer, w, x, attended)
    return state[0], state[1], *chosen(ops, layer, w, state[1])


def chosen(ops: Any, layer: Layer, w: Weights, read: Tensor) -> tuple[Tensor, ...]:
    """What experts read (N, hidden) -> of each token the numbers of its experts and what these weigh (N, top_k), and if
    there is a shared MLP what it makes."""
    part = layer.mlp
    assert isinstance(part, Experts), "a dense layer routes nothing"
    router = part.router
    routed_to = ops.route(
        read,
        w["router.weight"],
        w.get("router.bias"),
        w.get("router.correction"),
        router.top_k,
        sigmoid=router.scoring is Scoring.SIGMOID,
        renormalised=router.renormalised,
        scale=router.scale,
        groups=router.groups,
        top_groups=router.top_groups,
    )
    if part.shared is None:
        return routed_to[0], routed_to[1]
    shared = mlp(ops, part.shared, w, read, "shared.")
    if part.shared_gate:
        shared = ops.activation("sigmoid", ops.linear(read, w["shared_gate"])) * shared
    return routed_to[0], routed_to[1], shared


def after_attention(ops: Any, layer: Layer, w: Weights, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden before the layer (N, hidden) and attention output (N, H * D) -> the residual stream, and what the MLP
    reads."""
    return after_output(ops, layer, w, x, attention_out(ops, w, attended))


def attention_out(ops: Any, w: Weights, attended: Tensor) -> Tensor:
    """Attention output (N, H * D) -> (N, hidden); of a slice's heads, its part of the sum over all ranks."""
    return ops.linear(attended, w["out.weight"], w.get("out.bias"))


def after_output(ops: Any, layer: Layer, w: Weights, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden before the layer and what the output projection made (N, hidden) -> the residual stream, and what the MLP
    reads."""
    if layer.attention_out_norm is not None:
        out = norm(ops, layer.attention_out_norm, w, "attention_out_norm", out)
    before, read = layer.place is NormPlace.BEFORE, x
    x = x + out
    if not before:
        x = norm(ops, layer.attention_norm, w, "attention_norm", x)
    if not layer.parallel:
        read = x
    return x, mlp_input(ops, layer, w, read)


def mlp_input(ops: Any, layer: Layer, w: Weights, x: Tensor) -> Tensor:
    """The residual stream (N, hidden), of a parallel layer that before its attention -> what the MLP reads."""
    if layer.mlp_norm is None:
        return norm(ops, layer.attention_norm, w, "attention_norm", x)
    return norm(ops, layer.mlp_norm, w, "mlp_norm", x) if layer.place is NormPlace.BEFORE else x


def made(ops: Any, layer: Layer, w: Weights, read: Tensor) -> Tensor:
    """What the MLP reads (N, hidden) -> what it makes, or the experts and the shared MLP do; of a slice, its part of
    the sum over all ranks."""
    part = layer.mlp
    if isinstance(part, MLP):
        return mlp(ops, part, w, read)
    dense, of_experts = apart(w)
    numbers, shares, *shared = chosen(ops, layer, dense, read)
    each = [functools.partial(mlp, ops, part.expert, own) for own in of_experts]
    out: Tensor = ops.through_experts(read, numbers, shares, each)
    return out + shared[0] if shared else out


def after_mlp(ops: Any, layer: Layer, w: Weights, x: Tensor, out: Tensor, shared: Tensor | None = None) -> Tensor:
    """The residual stream, what the MLP or the experts made, and what the shared MLP did (N, hidden) -> hidden after
    the layer."""
    if shared is not None:
        out = out + shared
    if layer.mlp_out_norm is not None:
        out = norm(ops, layer.mlp_out_norm, w, "mlp_out_norm", out)
    x = x + out
    if layer.place is NormPlace.AFTER and layer.mlp_norm is not None:
        x = norm(ops, layer.mlp_norm, w, "mlp_norm", x)
    return x


def mlp(ops: Any, part: MLP, w: Weights, x: Tensor, prefix: str = "") -> Tensor:
    """(N, hidden) -> (N, hidden). prefix: of the names of its weights."""

    def linear(x: Tensor, name: str) -> Tensor:
        return ops.linear(x, w[f"{prefix}{name}.weight"], w.get(f"{prefix}{name}.bias"))

    if part.clamp is not None:
        inner = ops.clamped_gate(linear(x, "gate_up"), part.clamp.limit, part.clamp.alpha)
    elif part.gated:
        both = linear(x, "gate_up").chunk(2, dim=-1)
        inner = ops.activation(part.activation, both[0]) * both[1]
    else:
        inner = ops.activation(part.activation, linear(x, "up"))
    return linear(inner, "down")


def head(ops: Any, decoder: Decoder, w: Weights, x: Tensor) -> Tensor:
    """Hidden (R, hidden) of the rows that need logits -> logits (R, vocab)."""
    part = decoder.head
    if part.norm is not None:
        x = norm(ops, part.norm, w, "norm", x)
    if "project_out" in w:
        x = ops.linear(x, w["project_out"])
    logits = ops.linear(x, w["tokens"] if decoder.tied else w["unembed"], w.get("unembed.bias"))
    return logits if part.soft_cap is None else ops.soft_capped(logits, part.soft_cap)


def norm(ops: Any, part: Norm, w: Weights, name: str, x: Tensor) -> Tensor:
    """Over the last dimension."""
    if part.kind is NormKind.LAYER:
        return ops.layer_norm(x, w.get(f"{name}.weight"), w.get(f"{name}.bias"), part.eps)
    if part.kind is NormKind.RMS_AROUND_ONE:
        return ops.rms_norm_around_one(x, w[name], part.eps)
    return ops.rms_norm(x, w[name], part.eps)
