import pytest
import torch
from cases import mlp
from hypothesis import given, settings
from hypothesis import strategies as st

from spectreg import SpectralNormRegularizer
from spectreg.linalg.rotations import tournament, turned


def drawn(k: int, kind: str, seed: int) -> torch.Tensor:
    M = torch.randn(4, k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"any": M, "triangular": M.triu(), "rank one": M[:, :, :1] @ M[:, :1], "zero": 0 * M,
            "repeated": torch.eye(k) + 1e-3 * M}[kind]  # fmt: skip


@given(k=st.integers(2, 8), seed=st.integers(0, 99),
       kind=st.sampled_from(["any", "triangular", "rank one", "zero", "repeated"]))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_rotations_find_the_singular_values_that_a_decomposition_finds_and_stay_orthogonal(k, seed, kind):
    M = drawn(k, kind, seed)
    for sweeps in (1, 14):
        A, s, B = turned(M, tournament(k, M.device), sweeps)
        for Q in (A, B):
            torch.testing.assert_close(Q.mT @ Q, torch.eye(k, dtype=M.dtype).expand_as(M))
    torch.testing.assert_close(s, torch.linalg.svdvals(M), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(A @ torch.diag_embed(s) @ B.mT, M, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_with_the_rotations_of_an_accelerator_the_k_values_and_the_gradient_are_those_of_a_cpu(k, monkeypatch):
    cpu, other = mlp(widths=(12, 9, 10)), mlp(widths=(12, 9, 10))
    a = SpectralNormRegularizer(cpu, 1.0, k=k, warmup=200)
    a.add_gradient()
    monkeypatch.setattr("spectreg.power_iteration.step.decomposed", turned)
    b = SpectralNormRegularizer(other, 1.0, k=k, warmup=200)
    b.add_gradient()
    for name, x in a.state_dict()["vectors"].items():
        torch.testing.assert_close(b.state_dict()["vectors"][name]["sigma"], x["sigma"], rtol=1e-6, atol=0)
    for p, q in zip(cpu.parameters(), other.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-5)


def test_on_an_accelerator_nothing_is_decomposed_by_a_call_that_reads_back(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("torch.linalg.svd waits for an accelerator")

    monkeypatch.setattr("spectreg.power_iteration.step.decomposed", turned)
    monkeypatch.setattr(torch.linalg, "svd", refused)
    SpectralNormRegularizer(mlp(), 1.0, k=2).add_gradient()
