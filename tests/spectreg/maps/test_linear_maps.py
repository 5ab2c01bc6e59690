import pytest
import torch
from cases import KINDS, seeded

from spectreg import named_weights
from spectreg.maps import matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("piece", [1, 20, 10**6])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_products_and_the_outer_product_of_a_map_are_those_of_its_dense_blocks(kind, m, piece, dtype, monkeypatch):
    # Vectors are in float64: a weight in float32 is cut, and one in float64 where it is multiplied with several.
    for name in ("TILE", "SHARED", "ALONE", "SINGLE"):
        monkeypatch.setattr(f"spectreg.maps.matrix.{name}", piece)
    module = seeded(kind.build)
    chosen = named_weights(module, select=lambda name, _: name == kind.weight, **kind.settings)
    A, weight = chosen[0].map, chosen[0].tensor.detach().to(dtype)
    W = weight.double()
    blocks, generator = torch.stack(kind.matrices(W)), torch.Generator().manual_seed(1)
    v = torch.randn(m, A.blocks, A.inputs, generator=generator, dtype=torch.float64)
    u = torch.randn(m, A.blocks, A.outputs, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(A.matrices(W), blocks)
    torch.testing.assert_close(A.forward(weight, v.flatten(1)).view_as(u), torch.einsum("boi,mbi->mbo", blocks, v))
    torch.testing.assert_close(A.adjoint(weight, u.flatten(1)).view_as(v), torch.einsum("boi,mbo->mbi", blocks, u))
    there, back = A.round_trip(weight, v.flatten(1))
    torch.testing.assert_close(there.view_as(u), torch.einsum("boi,mbi->mbo", blocks, v))
    torch.testing.assert_close(back.view_as(v), torch.einsum("boi,mbo->mbi", blocks, there.view_as(u)))
    torch.testing.assert_close(A.forward(weight, v[0].flatten()), A.forward(weight, v[:1].flatten(1))[0])
    torch.testing.assert_close(A.adjoint(weight, u[0].flatten()), A.adjoint(weight, u[:1].flatten(1))[0])
    torch.testing.assert_close(A.squares(W), blocks.square().sum((1, 2)))
    G = torch.zeros_like(weight)
    A.add_outer_(G, u.flatten(1), v.flatten(1), alpha=-2.0)
    torch.testing.assert_close(A.matrices(G), (-2 * torch.einsum("mbo,mbi->boi", u, v)).to(dtype))


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_gradient_stored_otherwise_than_its_weight_gets_the_same_numbers(kind):
    module = seeded(kind.build)
    chosen = named_weights(module, select=lambda name, _: name == kind.weight, **kind.settings)
    m, W = chosen[0].map, chosen[0].tensor.detach()
    u = torch.ones(1, m.blocks * m.outputs, dtype=torch.float64)
    v = torch.arange(m.blocks * m.inputs, dtype=torch.float64)[None]
    straight, strided = torch.zeros(W.shape, dtype=W.dtype), torch.zeros(*W.shape, 2, dtype=W.dtype)[..., 0]
    m.add_outer_(straight, u, v)
    m.add_outer_(strided, u, v)
    torch.testing.assert_close(strided, straight)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("shape", [(37, 53), (64, 8), (3, 300), (1, 70)], ids=str)
@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("stored", ["rows", "columns", "bfloat16"])
def test_products_with_few_rows_are_those_of_the_matrix_on_any_number_of_threads(
    threads, shape, m, stored, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name in ("TILE", "SHARED", "ALONE"):
        monkeypatch.setattr(matrix, name, 40)
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(shape, generator=generator)
    A = {"rows": A, "columns": A.t().contiguous().t(), "bfloat16": A.bfloat16()}[stored]
    x, y = torch.randn(m, shape[1], generator=generator), torch.randn(m, shape[0], generator=generator)
    forward, adjoint = x.double() @ A.t().double(), y.double() @ A.double()
    torch.testing.assert_close(matrix.times(x, A.t()).double(), forward, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(matrix.times(y, A).double(), adjoint, rtol=1e-5, atol=1e-4)
    there, back = matrix.there_and_back(x, A)
    torch.testing.assert_close(there.double(), forward, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(back.double(), forward @ A.double(), rtol=1e-5, atol=1e-3)
