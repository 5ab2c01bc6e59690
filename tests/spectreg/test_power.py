import torch
from truth import printed_algorithm

from spectreg.power import power_step


def gaussian() -> torch.Tensor:
    return torch.randn(100, 576, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 20


def test_algorithm_1_as_printed_tends_to_one_over_sigma_and_its_vector_overflows_while_ours_finds_sigma():
    W, v = gaussian(), torch.randn(576, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    truth = torch.linalg.matrix_norm(W, 2)
    printed, grown = printed_algorithm(W, v, steps=200)
    triplet_v = v[None]
    for _ in range(200):
        sigma, _, triplet_v = power_step(W[None], triplet_v)
    torch.testing.assert_close(printed, 1 / truth, rtol=1e-3, atol=0)
    assert grown.norm() > 1e38
    torch.testing.assert_close(sigma[0], truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(triplet_v.norm(), torch.tensor(1.0, dtype=torch.float64))
