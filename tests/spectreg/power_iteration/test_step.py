import pytest
import torch
from truth import printed_algorithm

from spectreg.maps.matrix import MatrixMap
from spectreg.power_iteration.step import Side, Vectors


def gaussian() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(100, 576, generator=generator, dtype=torch.float64) / 20
    return W, torch.randn(576, generator=generator, dtype=torch.float64)


def vectors_of(W: torch.Tensor, v: torch.Tensor) -> Vectors:
    shape = tuple(W.shape)
    return Vectors([MatrixMap(shape)], [W.new_zeros(1, shape[0], 1)], [v.view(1, -1, 1)], [W.new_zeros(1, 1)])


def test_algorithm_1_as_printed_tends_to_one_over_sigma_and_its_vector_overflows_while_ours_finds_sigma():
    W, v = gaussian()
    truth = torch.linalg.matrix_norm(W, 2)
    printed, grown = printed_algorithm(W, v, steps=200)
    ours = vectors_of(W, v)
    ours.advance([W], halves=2000)
    torch.testing.assert_close(printed, 1 / truth, rtol=1e-3, atol=0)
    assert grown.norm() > 1e38
    torch.testing.assert_close(ours.sigma[0, 0], truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.V.norm(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("rank", [2, 30])
def test_a_whole_step_is_two_half_steps(m, rank):
    generator = torch.Generator().manual_seed(2)
    A, B = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (30, 40))
    W, v = A @ B.T, torch.linalg.qr(torch.randn(40, m, generator=generator, dtype=torch.float64)).Q
    parts = [MatrixMap((30, 40))], [W.new_zeros(1, 30, m)], [v[None]], [W.new_ones(1, m)]
    whole, halves = Vectors(*parts), Vectors(*parts)
    for _ in range(3):
        whole.advance([W], halves=2)
        halves.advance([W], halves=1)
        halves.advance([W], halves=1, from_u=True)
        torch.testing.assert_close(whole.sigma, halves.sigma, rtol=1e-10, atol=1e-10)
        for x, y in ((whole.U, halves.U), (whole.V, halves.V)):  # each up to its sign
            torch.testing.assert_close((x[:rank] * y[:rank]).sum(1).abs(), y[:rank].square().sum(1))


@pytest.mark.parametrize("sizes", [[5], [3, 4, 5], [2, 2, 7, 1, 3, 3, 3, 6, 4]], ids=len)
@pytest.mark.parametrize("m", [1, 2, 4])
def test_products_of_few_vectors_are_those_of_each_block_however_many_blocks_there_are(sizes, m):
    counts = [1 + i % 2 for i in range(len(sizes))]  # some maps have two blocks
    side = Side.of(sizes, counts, m, torch.device("cpu"))
    columns = sum(size * count for size, count in zip(sizes, counts, strict=True))
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(m, columns, generator=generator, dtype=torch.float64) for _ in range(2))
    C = torch.randn(sum(counts), m, m, generator=generator, dtype=torch.float64)
    each = [size for size, count in zip(sizes, counts, strict=True) for _ in range(count)]
    pairs = list(zip(x.split(each, 1), y.split(each, 1), strict=True))
    torch.testing.assert_close(side.gram(x, y), torch.stack([a @ b.t() for a, b in pairs]))
    torch.testing.assert_close(
        side.combine(x, C), torch.cat([c.t() @ a for c, (a, _) in zip(C, pairs, strict=True)], 1)
    )
    torch.testing.assert_close(side.lengths(x), torch.stack([a.norm(dim=1) for a, _ in pairs], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_apart_from_the_rest_is_found_when_it_becomes_the_largest(dtype):
    W = torch.diag(torch.tensor([1.0, 0.8, 0.1], dtype=dtype))
    vectors = vectors_of(W, torch.ones(3, dtype=dtype) / 3**0.5)
    vectors.advance([W], halves=4000)  # what v has along the last fades to less than any number
    W[2, 2] = 3.0
    vectors.advance([W], halves=200)
    assert vectors.sigma[0, 0].item() == pytest.approx(3.0)
