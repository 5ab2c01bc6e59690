"""What is checked once for calls that are alike is checked at every call that is not."""

import annotations
import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float
from torch import Tensor


@annotations.jaxtyped(typechecker=beartype)
def gram(x: Float[Tensor, "n m"], cut: int | None = None) -> Float[Tensor, "n n"]:
    return (x @ x.T)[:cut]


made = torch.ones(2, 2)


@annotations.jaxtyped(typechecker=beartype)
def given(x: Float[Tensor, "n n"], inner: list[Float[Tensor, "n"]]) -> Float[Tensor, "n n"]:
    return made


@pytest.mark.parametrize(
    "other", [torch.ones(2), torch.ones(2, 3, dtype=torch.int64), [1.0]], ids=["shape", "dtype", "type"]
)
def test_other_arguments_than_those_that_passed_are_refused(other):
    for _ in range(2):
        assert gram(torch.ones(2, 3)).shape == (2, 2)
        with pytest.raises(jaxtyping.TypeCheckError, match="checking the parameters"):
            gram(other)


def test_another_value_or_shape_of_the_same_type_is_another_call():
    gram(torch.ones(2, 3), 2)
    with pytest.raises(jaxtyping.TypeCheckError, match="checking the return value"):
        gram(torch.ones(2, 3), 1)
    with pytest.raises(jaxtyping.TypeCheckError, match="checking the return value"):
        gram(torch.ones(3, 3), cut=2)


def test_shapes_within_a_list_count():
    given(made, [torch.ones(2)])
    with pytest.raises(jaxtyping.TypeCheckError, match="checking the parameters"):
        given(made, [torch.ones(3)])


def test_another_result_from_such_arguments_as_have_passed_is_refused(monkeypatch):
    given(made, [])
    for other in (torch.ones(2, 3), torch.ones(2, 2).long(), None):
        monkeypatch.setitem(globals(), "made", other)
        with pytest.raises(jaxtyping.TypeCheckError, match="checking the return value"):
            given(torch.ones(2, 2), [])
    monkeypatch.undo()
    assert given(torch.ones(2, 2), []) is made


def test_what_the_tests_import_is_checked():
    from spectreg.maps.matrix import MatrixMap

    with pytest.raises(jaxtyping.TypeCheckError):
        MatrixMap(torch.ones(2))  # type: ignore[arg-type]
