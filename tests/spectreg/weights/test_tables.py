"""A parameter that a module looks up is a table, whatever the module is; one that it multiplies by is a weight."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectreg import named_weights


class Table(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


class Indexed(Table):
    def forward(self, ids):
        return self.weight[ids]


class Scaled(Table):
    def forward(self, ids):
        return F.dropout(F.embedding(ids, self.weight) * self.weight.shape[1] ** 0.5, 0.5, self.training)


class OneHot(Table):
    def forward(self, ids):
        return F.one_hot(ids, len(self.weight)).to(self.weight.dtype) @ self.weight


class Positions(Table):
    def forward(self, x):
        return x + self.weight[: x.shape[1]]


class Sequences(Table):
    def forward(self, ids):
        batch, length = ids.shape
        return self.weight[torch.arange(length)].expand(batch, -1, -1)


class Nearest(Table):
    """A codebook: the row that is nearest to the input."""

    def forward(self, x):
        return self.weight[torch.cdist(x, self.weight).argmin(-1)]


class PositionsInFront(Table):
    def forward(self, x):
        return F.relu(x + self.weight[:, : x.shape[1]])


class Rows(Table):
    def forward(self, x):
        return x @ self.weight.T


class Columns(Table):
    def forward(self, x):
        return x @ self.weight


class Cast(Table):
    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight)


class BestExpert(Table):
    """A router: of the products with its rows only the largest one is used."""

    def forward(self, x):
        return F.linear(x, self.weight).max(-1).values


class Experts(Table):
    def forward(self, ids):
        return self.weight[ids]


def names(model, **settings):
    return [w.name for w in named_weights(model, **settings)]


@pytest.mark.parametrize("build", [Indexed, Scaled, OneHot, Positions, Sequences, Nearest])
@pytest.mark.parametrize("shape", [(7, 4), (2, 4), (4, 4)])
def test_what_is_looked_up_a_row_at_a_time_is_a_table(build, shape):
    model = nn.ModuleDict({"words": build(*shape), "head": nn.Linear(4, 2)})
    assert names(model) == ["head.weight"]
    assert names(model, embeddings=True) == ["words.weight", "head.weight"]


def test_positions_with_a_first_dimension_of_one_are_a_table():
    assert names(nn.ModuleDict({"order": PositionsInFront(1, 7, 4), "head": nn.Linear(4, 2)})) == ["head.weight"]


@pytest.mark.parametrize("build", [Rows, Columns, Cast, BestExpert])
@pytest.mark.parametrize("shape", [(4, 4), (7, 4), (2, 4)])
def test_what_is_multiplied_by_is_a_weight(build, shape):
    assert names(build(*shape)) == ["weight"]


def test_experts_that_are_chosen_by_number_are_matrices():
    assert names(Experts(3, 5, 4)) == ["weight"]


def test_a_table_that_a_linear_layer_shares_is_one_there_too():
    model = nn.ModuleDict({"words": Indexed(7, 4), "head": nn.Linear(4, 7, bias=False), "other": nn.Linear(4, 2)})
    model["head"].weight = model["words"].weight
    assert names(model) == ["other.weight"]


@pytest.mark.parametrize("holder", ["wte", "wpe", "tok_embeddings", "vocab", "positional", "pos"])
def test_what_cannot_be_run_is_known_by_the_name_under_which_it_is_held(holder):
    assert names(nn.ModuleDict({holder: Table(7, 4), "pos_proj": Table(3, 4)})) == ["pos_proj.weight"]


def test_looking_leaves_module_random_state_and_hooks_alone():
    table, calls = Scaled(7, 4).train(), []
    table.register_forward_hook(lambda *_: calls.append(1))
    model = nn.ModuleDict({"words": table, "head": nn.Linear(4, 2)})
    weight, state = table.weight, torch.get_rng_state()
    assert names(model) == ["head.weight"]
    assert table.weight is weight
    assert weight.grad is None
    assert table.training
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)


class Cosine(Table):
    eps = 1e-6

    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Modulated(Table):
    eps = 1e-6


class Normalized(Table):
    eps = 1e-6

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * self.weight


@pytest.mark.parametrize("shape", [(4, 4), (7, 4), (2, 4)])
def test_a_module_with_an_epsilon_that_multiplies_has_a_weight_and_one_that_scales_has_none(shape):
    model = nn.ModuleDict({"a": Cosine(*shape), "b": Normalized(*shape), "c": Modulated(1, 5, *shape)})
    assert names(model, embeddings=True) == ["a.weight", "c.weight"]


@pytest.mark.parametrize("holder", ["embed", "pos", "lookup"])
@pytest.mark.parametrize("shape", [(4, 4), (7, 4), (2, 4)])
def test_what_multiplies_is_a_weight_under_the_name_of_a_table_too(holder, shape):
    assert names(nn.ModuleDict({holder: Rows(*shape), "head": nn.Linear(4, 2)})) == [f"{holder}.weight", "head.weight"]


class AllPositions(Table):
    def forward(self, x):
        return x + self.weight


def test_positions_that_are_added_to_all_places_are_a_table_by_their_name():
    assert names(nn.ModuleDict({"pos": AllPositions(7, 4), "head": nn.Linear(4, 2)})) == ["head.weight"]


class Shifted(Table):
    eps = 1e-6

    def __init__(self, *shape):
        super().__init__(*shape)
        self.bias = nn.Parameter(torch.randn(shape))


def test_a_scale_and_shift_of_three_dimensions_are_no_kernel():
    assert names(nn.ModuleDict({"a": Shifted(4, 5, 5), "b": nn.Linear(4, 2)}), embeddings=True) == ["b.weight"]


@pytest.mark.parametrize("build", [Indexed, AllPositions])
def test_a_table_that_says_its_features_is_one(build):
    table = build(7, 4)
    table.out_features = table.out_channels = 4
    assert names(nn.ModuleDict({"pos_embed": table, "head": nn.Linear(4, 2)})) == ["head.weight"]


def test_a_weight_of_eight_bits_is_not_run():
    module = Modulated(4, 4)
    module.weight = nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    model = nn.ModuleDict({"a": module, "head": nn.Linear(4, 2)})
    assert names(model, select=lambda name, _: name.startswith("head")) == ["head.weight"]
