"""Spill: outputs and gradients are those of the plain call, at any number of tiles; between forward and backward only inputs live."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqloom.runtime.offload
from seqloom.runtime.spill import spill


@pytest.fixture(autouse=True)
def _everything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seqloom.runtime.offload, "MINIMUM", 1)


def gradients(module: torch.nn.Module, x: torch.Tensor, call) -> list[torch.Tensor]:
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    out = call(leaf)
    (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), leaf.grad, *(parameter.grad for parameter in module.parameters())]


@settings(deadline=None)
@given(length=st.integers(1, 9), tiles=st.sampled_from((1, 2, 4, 16)))
def test_gradients_are_those_of_the_plain_call(length: int, tiles: int) -> None:
    torch.manual_seed(length)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.SiLU(), torch.nn.Linear(5, 3)).double()
    x = torch.randn(2, length, 3, dtype=torch.float64)
    options = {"tiles": tiles, "in_dims": (1,), "out_dims": (1,)} if tiles > 1 else {}
    for found, wanted in zip(gradients(module, x, lambda x: spill(module, x, **options)), gradients(module, x, module), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_several_outputs_and_an_argument_passed_whole() -> None:
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def segment(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * weight, (x * weight).sin().transpose(1, 2)

    def both(call) -> tuple[torch.Tensor, ...]:
        first, second = call(x, weight)
        return torch.autograd.grad(first.sum() + (second * 3).sum(), (x, weight))

    tiled = both(lambda x, w: spill(segment, x, w, tiles=4, in_dims=(1, None), out_dims=(1, 2)))
    for found, wanted in zip(tiled, both(segment), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_without_gradients_it_is_the_plain_call() -> None:
    with torch.no_grad():
        x = torch.randn(3)
        assert torch.equal(spill(torch.sin, x), torch.sin(x))


def test_the_forward_keeps_no_intermediate() -> None:
    alive = []

    def segment(x: torch.Tensor) -> torch.Tensor:
        middle = x.exp()
        alive.append(middle.untyped_storage()._weak_ref())
        return middle.sin()

    out = spill(segment, torch.randn(8, requires_grad=True))
    assert torch.UntypedStorage._expired(alive[0])
    out.sum().backward()
