"""Every weight of a decoder, and the checkpoint tensors it is made of, from its parts and a family's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from flexgen_bench.core.microscaling import Microscaling
from flexgen_bench.core.model import DType, TensorSpec
from flexgen_bench.models.parts import MLP, Decoder, Experts, Layer, Norm, NormKind

Sources = tuple[str, ...]
PartNames = dict[str, str | Sources]
SINKS = "sinks"  # of a layer, by name


@dataclass(frozen=True)
class Cut:
    """What a rank that shares a layer has of the checkpoint tensors of one of its own (``models/sliced.py``).

    shapes: of these, whole; which of their rows it has, say ``rows`` and ``firsts``. first_column: of a matrix, the
    first of its columns, of which it has as many as its spec says. is_zero: its values are zeros, since another rank
    adds what they are.
    """

    shapes: tuple[tuple[int, ...], ...]
    first_column: int = 0
    is_zero: bool = False


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a packed unit, and the checkpoint tensors it is made of, concatenated along dimension 0.

    rows: how many rows each source has; empty if all have the same number. firsts: where these begin in checkpoint
    tensors that hold more; empty if at their first. exact: never compressed, whatever is asked for. packing: how its
    codes lie in the checkpoint, which they keep whatever is asked for. dtype: its element type, whatever the model's
    is. expert: of which expert of its layer; None: of what every token meets. cut: of a slice of its layer; None: it
    has its sources' rows whole.
    """

    spec: TensorSpec
    sources: tuple[str, ...]
    rows: tuple[int, ...] = ()
    firsts: tuple[int, ...] = ()
    exact: bool = False
    packing: Microscaling | None = None
    dtype: DType | None = None
    expert: int | None = None
    cut: Cut | None = None

    def num_bytes(self, dtype: DType) -> int:
        """In a checkpoint of this type."""
        if self.packing is not None:
            return sum(self.packing.matrix_bytes(self.source_rows, self.spec.shape[1]))
        return self.spec.num_values * (self.dtype or dtype).bytes

    @property
    def source_rows(self) -> tuple[int, ...]:
        count = len(self.sources)
        return self.rows or (self.spec.shape[0] // count,) * count

    def plain_bytes(self, dtype: DType) -> int:
        """Uncompressed, of a model of this type."""
        return self.spec.num_values * (self.dtype or dtype).bytes


@dataclass(frozen=True)
class Inventory:
    """Every weight of a model, by schedulable unit.

    tables: gathered by row where they lie (token and position embeddings); ``tables[-1]`` is the token table.
    embed: other weights of the input embedding. layers: one list per decoder layer. head: what turns hidden
    states into logits, without the token table; if embeddings are tied, the head also reads ``tables[-1]``.
    """

    tables: tuple[PackedTensor, ...]
    embed: tuple[PackedTensor, ...]
    layers: tuple[tuple[PackedTensor, ...], ...]
    head: tuple[PackedTensor, ...]
    tied: bool

    @property
    def vocabulary(self) -> tuple[PackedTensor, ...]:
        """Matrices with a row for each token: the token table, and the head's own where embeddings are not tied."""
        tokens = self.tables[-1]
        return tokens, *(t for t in self.head if t.spec.shape == tokens.spec.shape)

    @property
    def num_values(self) -> int:
        """Parameters of the model; a tied table counts once."""
        return sum(t.spec.num_values for t in self._tensors)

    def num_bytes(self, dtype: DType) -> int:
        """Of a checkpoint of this type."""
        return sum(t.num_bytes(dtype) for t in self._tensors)

    @property
    def _tensors(self) -> Iterator[PackedTensor]:
        for unit in (self.tables, self.embed, *self.layers, self.head):
            yield from unit


@dataclass(frozen=True)
class Names:
    """What a family's checkpoints call their tensors, without ``.weight`` and ``.bias`` and below one of its prefixes.

    layer: by part, below ``<layers>.<number>.``: one tensor, or those that are stacked in this order. Parts:
    attention_norm, qkv, q_norm, k_norm, sinks (a tensor's whole name), out, attention_out_norm, mlp_norm, gate_up or
    up, down, mlp_out_norm; of a mixture router, router.correction (a tensor's whole name), those of the MLP below
    ``shared.``, shared_gate, and below ``experts.``: names with ``{}`` for the expert's number, or one of a tensor in
    which all experts are stacked (a tensor's whole name, with ``_bias`` for biases).
    """

    layer: Mapping[str, str | Sources]
    layers: str = "layers"
    tokens: str = "embed_tokens"
    positions: str = "embed_positions"
    embedding_norm: str = ""
    project_in: str = "project_in"
    norm: str = "norm"
    project_out: str = "project_out"
    unembed: str = "lm_head"


def inventory_of(decoder: Decoder, names: Names) -> Inventory:
    """Names, shapes and checkpoint sources of every weight."""
    hidden, width = decoder.hidden, decoder.embedding.width
    tokens = _table("tokens", (decoder.vocab, width), names.tokens)
    tables = [tokens]
    if decoder.embedding.positions:
        rows = decoder.embedding.positions + decoder.embedding.offset
        tables.insert(0, _table("positions", (rows, hidden), names.positions))
    embed = [*_norm(decoder.embedding.norm, "embedding_norm", names.embedding_norm, hidden)]
    head = [*_norm(decoder.head.norm, "norm", names.norm, hidden)]
    if width != hidden:
        embed.append(_table("project_in", (hidden, width), names.project_in))
        head.append(_table("project_out", (width, hidden), names.project_out))
    if not decoder.tied:
        head.append(_table("unembed", (decoder.vocab, width), names.unembed))
    if decoder.head.bias:
        bias = TensorSpec("unembed.bias", (decoder.vocab,))
        head.append(PackedTensor(bias, (f"{names.unembed}.bias",)))
    return Inventory(
        tables=tuple(tables),
        embed=tuple(embed),
        layers=tuple(
            tuple(_layer(layer, names, f"{names.layers}.{number}")) for number, layer in enumerate(decoder.layers)
        ),
        head=tuple(head),
        tied=decoder.tied,
    )


def _table(name: str, shape: tuple[int, int], source: str) -> PackedTensor:
    return PackedTensor(TensorSpec(name, shape), (f"{source}.weight",))


def _layer(layer: Layer, names: Names, prefix: str) -> Iterator[PackedTensor]:
    attention, hidden = layer.attention, layer.hidden

    def source(part: str) -> Sources:
        part_names = names.layer[part]
        return tuple(f"{prefix}.{s}" for s in ((part_names,) if isinstance(part_names, str) else part_names))

    def norm(part: str, what: Norm | None, width: int) -> Iterator[PackedTensor]:
        if what is not None:
            yield from _norm(what, part, source(part)[0], width)

    def linear(part: str, rows: tuple[int, ...], inputs: int, bias: bool) -> Iterator[PackedTensor]:
        sources = source(part)
        if len(sources) == 1:
            rows = (sum(rows),)
        shapes: dict[str, tuple[int, ...]] = {"weight": (sum(rows), inputs)}
        if bias:
            shapes["bias"] = (sum(rows),)
        for kind, shape in shapes.items():
            spec = TensorSpec(f"{part}.{kind}", shape)
            yield PackedTensor(spec, tuple(f"{s}.{kind}" for s in sources), rows)

    yield from norm("attention_norm", layer.attention_norm, hidden)
    yield from linear("qkv", tuple(attention.rows.values()), hidden, attention.bias)
    yield from norm("q_norm", attention.qk_norm, attention.head_dim)
    yield from norm("k_norm", attention.qk_norm, attention.head_dim)
    if attention.sinks:
        yield PackedTensor(TensorSpec(SINKS, (attention.heads,)), source(SINKS))
    yield from linear("out", (hidden,), attention.rows["q"], attention.out_bias)
    yield from norm("attention_out_norm", layer.attention_out_norm, hidden)
    yield from norm("mlp_norm", layer.mlp_norm, hidden)
    if isinstance(layer.mlp, MLP):
        for part, rows, inputs, bias in _mlp(layer.mlp, hidden):
            yield from linear(part, rows, inputs, bias)
    yield from norm("mlp_out_norm", layer.mlp_out_norm, hidden)
    if isinstance(layer.mlp, Experts):
        yield from _experts(layer.mlp, hidden, source, linear)


def _mlp(mlp: MLP, hidden: int) -> Iterator[tuple[str, tuple[int, ...], int, bool]]:
    """Its matrices: (part, rows, inputs, whether it has a bias)."""
    if mlp.gated:
        yield "gate_up", (mlp.width, mlp.width), hidden, mlp.bias
    else:
        yield "up", (mlp.width,), hidden, mlp.bias
    yield "down", (hidden,), mlp.width, mlp.bias


def _experts(
    part: Experts,
    hidden: int,
    source: Callable[[str], Sources],
    linear: Callable[[str, tuple[int, ...], int, bool], Iterator[PackedTensor]],
) -> Iterator[PackedTensor]:
    """Of a mixture: first what every token meets, then expert by expert."""
    router = part.router
    for tensor in linear("router", (part.count,), hidden, router.bias):
        yield replace(tensor, exact=True)
    if router.correction:
        # Large beside the differences between scores, so that rounding it would change what is chosen.
        spec = TensorSpec("router.correction", (part.count,))
        yield PackedTensor(spec, source("router.correction"), dtype=DType.FLOAT32)
    if part.shared is not None:
        for name, rows, inputs, bias in _mlp(part.shared, hidden):
            yield from linear(f"shared.{name}", rows, inputs, bias)
        if part.shared_gate:
            spec = TensorSpec("shared_gate", (1, hidden))
            yield PackedTensor(spec, tuple(f"{s}.weight" for s in source("shared_gate")), exact=True)
    matrices = [(m[0], source(f"experts.{m[0]}"), *m[1:]) for m in _mlp(part.expert, hidden)]
    for number in range(part.count):
        for name, sources, rows, inputs, bias in matrices:
            for tensor in _of_expert(number, name, sources, rows, inputs, bias):
                yield replace(tensor, packing=part.packing if len(tensor.spec.shape) == 2 else None)


def _of_expert(
    number: int, name: str, sources: Sources, rows: tuple[int, ...], inputs: int, bias: bool
) -> Iterator[PackedTensor]:
    count = sum(rows)
    shapes: dict[str, tuple[int, ...]] = {"weight": (count, inputs)}
    if bias:
        shapes["bias"] = (count,)
    for kind, shape in shapes.items():
        spec = TensorSpec(f"experts.{number}.{name}.{kind}", shape)
        if "{}" in sources[0]:
            own = rows if len(sources) > 1 else (count,)
            yield PackedTensor(spec, tuple(f"{s.format(number)}.{kind}" for s in sources), own, expert=number)
        else:
            whole = sources[0] + ("_bias" if kind == "bias" else "")
            yield PackedTensor(spec, (whole,), (count,), (number * count,), expert=number)


def _norm(norm: Norm | None, name: str, source: str, width: int) -> Iterator[PackedTensor]:
    if norm is None or not norm.affine:
        return
    if norm.kind is not NormKind.LAYER:
        yield PackedTensor(TensorSpec(name, (width,)), (f"{source}.weight",))
        return
    for kind in ("weight", "bias"):
        yield PackedTensor(TensorSpec(f"{name}.{kind}", (width,)), (f"{source}.{kind}",))
