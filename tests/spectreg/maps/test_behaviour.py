"""Layers that compute something else than their attributes say, and some that only look so."""

import pytest
import torch
from altered import ALTERED, AS_THEIR_ATTRIBUTES_SAY, OF_TWO_MINDS, dense, snapshot
from cases import unchecked_types
from torch import nn
from torch.nn.utils import parametrizations

from spectreg import SpectralNormRegularizer, input_sizes, named_weights
from spectreg.maps.behaviour import undisturbed

SIZE = (5, 6)


@pytest.mark.parametrize("name", ALTERED | OF_TWO_MINDS)
def test_the_operator_of_a_layer_with_a_forward_of_its_own_is_refused_by_name(name):
    model = nn.Sequential((ALTERED | OF_TWO_MINDS)[name]())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'operator' does not fit '0\.weight(_g)?'.*Use map|part of a weight"):
        SpectralNormRegularizer(model, 0.1, map="operator", input_size=SIZE)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", AS_THEIR_ATTRIBUTES_SAY)
def test_the_operator_of_a_layer_that_only_looks_altered_has_the_norm_of_its_dense_matrix(name):
    layer = AS_THEIR_ATTRIBUTES_SAY[name]()
    (weight,) = named_weights(layer.eval(), map="operator", input_size=SIZE)
    found = weight.map.matrices(weight.tensor.detach())[0]
    torch.testing.assert_close(found, dense(layer, (2, *SIZE)))


def test_a_layer_that_keeps_its_matrix_may_have_a_forward_of_its_own_beside_an_operator():
    model = nn.Sequential(ALTERED["weight standardization"](), nn.Conv2d(3, 3, 3, dtype=torch.float64))
    weights = named_weights(model, map={"1.weight": "operator"}, input_size=SIZE)
    assert [w.map.inputs for w in weights] == [18, 90]


def test_running_a_model_leaves_no_trace_on_its_attributes_lists_and_buffers():
    class Hoarder(nn.BatchNorm1d):
        def __init__(self):
            super().__init__(3)
            self.seen, self.cache = [], {}

        def forward(self, x):
            self.seen.append(x)
            self.cache["x"], self.last = x, x
            self.running_mean += 1
            return super().forward(x)

    model = Hoarder().train()
    with undisturbed(model):
        assert not model.training
        model(torch.zeros(2, 3))
    assert (model.training, model.seen, model.cache, hasattr(model, "last")) == (True, [], {}, False)
    assert model.running_mean.tolist() == [0, 0, 0]


def test_a_convolution_that_meets_several_sizes_is_given_all_of_them_and_no_operator_picks_one():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            return self.conv(x).sum() + self.conv(input=x.new_zeros(1, 1, 9, 100)).sum() + self.conv(x).sum()

    model = Shared()
    sizes = input_sizes(model, torch.zeros(1, 1, 10, 3))
    assert sizes == {"conv.weight": ((10, 3), (9, 100))}
    with unchecked_types(), pytest.raises(ValueError, match=r"conv\.weight'.* several sizes, .*Choose one of them"):
        SpectralNormRegularizer(model, 0.1, map="operator", input_size=sizes)


def test_reading_sizes_moves_no_buffer_and_sets_no_attribute():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))).train()
    before = snapshot(model)
    assert input_sizes(model[0], torch.zeros(1, 2, 8, 8)) == {"weight": (8, 8)}
    assert snapshot(model) == before


def test_a_lazy_model_is_told_to_run_first():
    with pytest.raises(ValueError, match=r"'weight' is uninitialized \(a lazy module\): run the model forward once"):
        input_sizes(nn.LazyConv2d(3, 3), torch.zeros(1, 1, 5, 5))


def test_the_sizes_of_inputs_are_found_without_values_and_an_input_with_values_is_refused_by_name():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)).to("meta")
    example = torch.zeros(1, 3, 32, 32)
    assert input_sizes(network, example.to("meta")) == {"0.weight": (32, 32), "3.weight": (15, 15)}
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is on the meta device .* example with \.to\('meta'\)"):
        input_sizes(network, example)
