import pytest
import torch
from cases import mlp
from hypothesis import given, settings
from hypothesis import strategies as st

from spectreg import SpectralNormRegularizer
from spectreg.linalg.eigenbasis import eigenbasis, rotated


def drawn(k: int, kind: str, seed: int) -> torch.Tensor:
    M = torch.randn(4, k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Y = {"any": M, "triangular": M.triu(), "rank one": M[:, :, :1] @ M[:, :1], "zero": 0 * M,
         "repeated": torch.eye(k) + 1e-3 * M}[kind]  # fmt: skip
    return Y.mT @ Y


@given(k=st.integers(1, 12), seed=st.integers(0, 99),
       kind=st.sampled_from(["any", "triangular", "rank one", "zero", "repeated"]))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_both_ways_to_the_eigenbasis_find_the_eigenvalues_the_largest_first_and_orthogonal_vectors(k, seed, kind):
    G = drawn(k, kind, seed)
    for values, B in (eigenbasis(G), rotated(G)):
        torch.testing.assert_close(B.mT @ B, torch.eye(k, dtype=G.dtype).expand_as(G))
        torch.testing.assert_close(values, torch.linalg.svdvals(G), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(B @ torch.diag_embed(values) @ B.mT, G, rtol=1e-9, atol=1e-9)
    _, B = rotated(G, sweeps=1)
    torch.testing.assert_close(B.mT @ B, torch.eye(k, dtype=G.dtype).expand_as(G))


@pytest.mark.parametrize("k", [2, 3, 5])
def test_with_the_rotations_of_an_accelerator_the_k_values_and_the_gradient_are_those_of_a_cpu(k, monkeypatch):
    cpu, other = mlp(widths=(12, 9, 10)), mlp(widths=(12, 9, 10))
    a = SpectralNormRegularizer(cpu, 1.0, k=k, warmup=200)
    a.add_gradient()
    monkeypatch.setattr("spectreg.power_iteration.step.eigenbasis", rotated)
    b = SpectralNormRegularizer(other, 1.0, k=k, warmup=200)
    b.add_gradient()
    for name, x in a.state_dict()["vectors"].items():
        torch.testing.assert_close(b.state_dict()["vectors"][name]["sigma"], x["sigma"], rtol=1e-6, atol=0)
    for p, q in zip(cpu.parameters(), other.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings_", [{"k": 2}, {"tracked": 3}], ids=str)
def test_no_call_is_made_that_makes_an_accelerator_wait_for_a_decomposition(settings_, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("torch.linalg waits for an accelerator")

    monkeypatch.setattr("spectreg.power_iteration.step.eigenbasis", rotated)
    regularizer = SpectralNormRegularizer(mlp(), 1.0, **settings_)
    for name in ("svd", "svdvals", "eigh", "eigvalsh", "qr", "cholesky"):
        monkeypatch.setattr(torch.linalg, name, refused)
    regularizer.add_gradient()
