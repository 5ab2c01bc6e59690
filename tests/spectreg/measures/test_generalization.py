import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectreg.measures.generalization import common_threshold, generalization_gap

curves = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8)


@given(curves, st.floats(0, 1))
def test_the_gap_is_the_least_over_the_epochs_above_alpha(points, alpha):
    training, test = np.array(points).T
    above = test > alpha
    expected = (training - test)[above].min() if above.any() else None
    assert generalization_gap(list(training), list(test), alpha) == expected


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1, max_size=5))
def test_the_common_threshold_is_exceeded_by_all_and_the_next_is_not(curves):
    alpha = common_threshold(curves)
    assert round(100 * alpha) / 100 == alpha
    assert all(max(curve) > alpha - 1e-9 for curve in curves)
    assert any(max(curve) <= alpha + 0.01 + 1e-9 for curve in curves)


def test_an_accuracy_that_is_a_multiple_does_not_exceed_itself():
    assert common_threshold([[0.88], [0.95]]) == 0.87
    assert common_threshold([[0.29]]) == 0.28


def test_curves_of_different_length_and_no_curves_are_named():
    with pytest.raises(ValueError, match="2 and 1 epochs"):
        generalization_gap([0.1, 0.2], [0.1], 0.0)
    with pytest.raises(ValueError, match="2 test curves, of which 1 empty"):
        common_threshold([[0.1], []])
    with pytest.raises(ValueError, match="0 test curves"):
        common_threshold([])


@pytest.mark.parametrize("training", [[math.nan, 0.8, 0.9], [0.8, 0.9, math.nan], [0.8, math.nan, 0.9]])
def test_epochs_without_a_number_are_left_out_of_the_gap(training):
    test = [0.7, 0.75, 0.7]
    known = [(a, b) for a, b in zip(training, test, strict=True) if not math.isnan(a)]
    assert generalization_gap(training, test, 0.5) == min(a - b for a, b in known)
