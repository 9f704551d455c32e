"""Tokens through experts: grouped by expert, they come out as one by one, in any company."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgen_bench.kernels.experts import route, through_experts

HIDDEN, COUNT = 12, 6
GROUPED = {"n_group": 3, "topk_group": 2}


def router(name: str, **settings: Any) -> Any:
    """A router of transformers with random weights, whose correction is large beside its scores."""
    import transformers
    from transformers.models.glm4_moe import modeling_glm4_moe as glm
    from transformers.models.mixtral import modeling_mixtral as mixtral
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

    kind = {"Mixtral": mixtral.MixtralTopKRouter, "Qwen3Moe": qwen.Qwen3MoeTopKRouter, "Glm4Moe": glm.Glm4MoeTopkRouter}
    count = "n_routed_experts" if name == "Glm4Moe" else "num_local_experts" if name == "Mixtral" else "num_experts"
    config = getattr(transformers, f"{name}Config")(hidden_size=HIDDEN, **{count: COUNT}, **settings)
    made = kind[name](config)
    torch.manual_seed(1)
    with torch.no_grad():
        made.weight.copy_(torch.randn(COUNT, HIDDEN))
        for buffer in made.buffers():
            buffer.copy_(torch.randn(COUNT))
    return made


@pytest.mark.parametrize(
    ("name", "settings", "own"),
    [
        ("Mixtral", {"num_experts_per_tok": 2}, {"renormalised": True}),
        ("Qwen3Moe", {"num_experts_per_tok": 3, "norm_topk_prob": False}, {}),
        ("Qwen3Moe", {"num_experts_per_tok": 3, "norm_topk_prob": True}, {"renormalised": True}),
        ("Glm4Moe", {"num_experts_per_tok": 4}, {"sigmoid": True, "renormalised": True}),
        (
            "Glm4Moe",
            {
                "num_experts_per_tok": 3,
                "n_group": 3,
                "topk_group": 2,
                "routed_scaling_factor": 2.5,
                "norm_topk_prob": False,
            },
            {"sigmoid": True, "groups": 3, "top_groups": 2, "scale": 2.5},
        ),
    ],
)
def test_routes_are_those_of_transformers(name: str, settings: dict[str, Any], own: dict[str, Any]) -> None:
    theirs, x = router(name, **settings), torch.randn(50, HIDDEN)
    with torch.no_grad():
        _, shares, chosen = theirs(x)
    correction = getattr(theirs, "e_score_correction_bias", None)
    defaults = {"sigmoid": False, "renormalised": False, "scale": 1.0, "groups": 1, "top_groups": 1}
    found, weights = route(x, theirs.weight, None, correction, settings["num_experts_per_tok"], **defaults | own)
    for token in range(len(x)):
        expected = dict(zip(chosen[token].tolist(), shares[token].tolist(), strict=True))
        assert dict(zip(found[token].tolist(), weights[token].tolist(), strict=True)) == pytest.approx(expected)


def test_a_correction_chooses_and_does_not_weigh() -> None:
    weight, correction = torch.eye(3), torch.tensor([0.0, 0.0, 5.0])
    x = torch.tensor([[1.0, 0.5, -1.0]])
    settings = {"renormalised": False, "scale": 1.0, "groups": 1, "top_groups": 1}
    chosen, shares = route(x, weight, None, correction, 2, sigmoid=True, **settings)
    assert chosen.tolist() == [[2, 0]]
    torch.testing.assert_close(shares, torch.tensor([[-1.0, 1.0]]).sigmoid())


def test_choices_are_made_in_float32() -> None:
    """Scores of a bfloat16 model that differ by less than bfloat16 resolves."""
    weight = torch.tensor([[1.0, 1.0], [1.0, 1.0078125]], dtype=torch.bfloat16)
    x = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    settings = {"sigmoid": False, "renormalised": False, "scale": 1.0, "groups": 1, "top_groups": 1}
    assert route(x, weight, None, None, 1, **settings)[0].tolist() == [[1]]


def make(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    chosen = torch.stack([torch.randperm(COUNT - 1)[:3] for _ in range(tokens)])  # nobody chooses the last one
    return x, chosen, torch.rand(tokens, 3), [torch.randn(HIDDEN, HIDDEN).to(dtype) for _ in range(COUNT)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 41])
def test_every_token_goes_through_its_experts(tokens: int, dtype: torch.dtype) -> None:
    x, chosen, shares, weights = make(tokens, dtype)
    called: list[int] = []

    def expert(number: int, rows: Tensor) -> Tensor:
        called.append(number)
        return rows @ weights[number]

    found = through_experts(x, chosen, shares, [functools.partial(expert, e) for e in range(COUNT)])
    assert found.dtype is dtype
    assert called == sorted(set(chosen.flatten().tolist())), "each once, and none that nobody has chosen"
    for token in range(tokens):
        parts = [s * (x[token].float() @ weights[e].float()) for e, s in zip(chosen[token], shares[token], strict=True)]
        close = {"rtol": 0.05, "atol": 0.1} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found[token].float(), torch.stack(parts).sum(0), **close)


def test_the_same_in_any_company() -> None:
    """In the order of the experts, whoever else has chosen them: nothing but the rounding of products may differ, and
    of these exact ones not even that."""
    x, chosen, shares, weights = make(30)
    experts = [functools.partial(torch.mul, w[0]) for w in weights]
    together = through_experts(x, chosen, shares, experts)
    for token in range(30):
        row = slice(token, token + 1)
        assert torch.equal(through_experts(x[row], chosen[row], shares[row], experts)[0], together[token])
    assert torch.equal(through_experts(x.flip(0), chosen.flip(0), shares.flip(0), experts), together.flip(0))
