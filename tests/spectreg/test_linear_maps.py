import pytest
import torch
from cases import KINDS, seeded

from spectreg import named_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tile", [1, 20, 10**6])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_products_and_the_outer_product_of_a_map_are_those_of_its_dense_blocks(kind, k, tile, dtype, monkeypatch):
    monkeypatch.setattr("spectreg.maps.products.TILE", tile)  # vectors are in float64: a weight in float32 is cut
    module = seeded(kind.build)
    chosen = named_weights(module, select=lambda name, _: name == kind.weight, **kind.settings)
    m, weight = chosen[0].map, chosen[0].tensor.detach().to(dtype)
    W = weight.double()
    blocks, generator = torch.stack(kind.matrices(W)), torch.Generator().manual_seed(1)
    v = torch.randn(m.blocks, m.inputs, k, generator=generator, dtype=torch.float64)
    u = torch.randn(m.blocks, m.outputs, k, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(m.matrices(W), blocks)
    torch.testing.assert_close(m.forward(weight, v.flatten(), k).view_as(u), blocks @ v)
    torch.testing.assert_close(m.adjoint(weight, u.flatten(), k).view_as(v), blocks.mT @ u)
    torch.testing.assert_close(m.squares(W), blocks.square().sum((1, 2)))
    G = torch.zeros_like(weight)
    m.add_outer_(G, u.flatten(), v.flatten(), k, alpha=-2.0)
    torch.testing.assert_close(m.matrices(G), (-2 * u @ v.mT).to(dtype))


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_gradient_stored_otherwise_than_its_weight_gets_the_same_numbers(kind):
    module = seeded(kind.build)
    chosen = named_weights(module, select=lambda name, _: name == kind.weight, **kind.settings)
    m, W = chosen[0].map, chosen[0].tensor.detach()
    u = torch.ones(m.blocks * m.outputs, dtype=torch.float64)
    v = torch.arange(m.blocks * m.inputs, dtype=torch.float64)
    straight, strided = torch.zeros(W.shape, dtype=W.dtype), torch.zeros(*W.shape, 2, dtype=W.dtype)[..., 0]
    m.add_outer_(straight, u, v)
    m.add_outer_(strided, u, v)
    torch.testing.assert_close(strided, straight)
