"""Norms of adapters against products and merged weights formed in float64."""

import peft
import pytest
import torch
import transformers
from torch import nn

from spectreg import adapter_norms


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 5, 3, stride=2, padding=1)
        self.fc = nn.Linear(5, 7)

    def forward(self, x):
        return self.fc(self.conv(self.table(x).mT).mT)


def norm(W):
    return torch.linalg.matrix_norm(W.double(), 2).item()


def adapted(model, **settings):
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 5, "init_lora_weights": False, **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def as_matrix(layer, delta):
    return delta.T if isinstance(layer.base_layer, nn.Embedding) else delta.flatten(1)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("target", ["table", "conv", "fc"])
def test_update_and_merged_weight_have_the_norms_of_the_formed_ones(target, rslora):
    torch.manual_seed(1)
    model = adapted(Net().double(), target_modules=[target], use_rslora=rslora).double()
    layer = getattr(model.base_model.model, target)
    delta = as_matrix(layer, layer.get_delta_weight("default"))
    W = as_matrix(layer, layer.base_layer.weight)
    ((name, found),) = adapter_norms(model).items()
    assert name == f"base_model.model.{target}"
    assert found.converged
    assert found.update == pytest.approx(norm(delta), rel=1e-12)
    assert found.merged == pytest.approx(norm(W + delta), rel=1e-7)


def test_active_adapters_are_summed_and_others_are_not():
    model = adapted(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"])
    for name in ("second", "third"):
        model.add_adapter(name, peft.LoraConfig(r=3, lora_alpha=2, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model[0]
    delta = (layer.get_delta_weight("default") + layer.get_delta_weight("second")).detach()
    (found,) = adapter_norms(model).values()
    assert found.update == pytest.approx(norm(delta), rel=1e-6)
    assert found.merged == pytest.approx(norm(layer.base_layer.weight + delta), rel=1e-6)


def test_a_layer_without_an_active_adapter_is_left_out():
    model = adapted(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), target_modules=["0"])
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["1"], init_lora_weights=False))
    model.set_adapter("second")
    assert list(adapter_norms(model)) == ["base_model.model.1"]


def test_a_merged_adapter_counts_once():
    model = adapted(nn.Sequential(nn.Linear(6, 5)).double(), target_modules=["0"]).double()
    (before,) = adapter_norms(model).values()
    model.merge_adapter()
    (after,) = adapter_norms(model).values()
    assert after.merged == pytest.approx(before.merged, rel=1e-9)
    assert after.update == before.update


def test_the_transposed_layers_of_gpt2_are_taken_the_right_way_round():
    config = transformers.GPT2Config(
        n_embd=8, n_head=2, n_layer=1, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=1
    )
    model = adapted(transformers.GPT2Model(config), target_modules=["c_attn"], fan_in_fan_out=True)
    layer = model.base_model.model.h[0].attn.c_attn
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    (found,) = adapter_norms(model).values()
    assert found.merged == pytest.approx(norm(merged), rel=1e-6)


def test_the_units_of_the_weight_do_not_matter():
    model = adapted(nn.Sequential(nn.Linear(6, 5)).double(), target_modules=["0"]).double()
    (before,) = adapter_norms(model).values()
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight *= 1e-200
        layer.lora_B["default"].weight *= 1e-200
    (after,) = adapter_norms(model).values()
    assert after.merged / 1e-200 == pytest.approx(before.merged, rel=1e-6)
    assert after.converged


def test_the_model_is_left_as_found():
    model = adapted(Net(), target_modules=["conv", "fc", "table"], lora_dropout=0.5).train()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter_norms(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def dora():
    model = adapted(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], use_dora=True)
    with torch.no_grad():
        model.base_model.model[0].lora_magnitude_vector["default"].weight *= 2
    return model


def adalora():
    config = peft.AdaLoraConfig(target_modules=["0"], init_r=2, target_r=1, total_step=10)
    return peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)


def switched_off():
    model = adapted(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"])
    model.base_model.disable_adapter_layers()
    return model


def hooked():
    model = adapted(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"])
    model.base_model.model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def grouped():
    return adapted(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), target_modules=["0"])


def quantized():
    model = adapted(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"])
    weight = model.base_model.model[0].base_layer.weight
    model.base_model.model[0].base_layer.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (dora, r"does not compute W \+ sBA .*DoRA"),
        (adalora, r"does not compute W \+ sBA .*AdaLoRA"),
        (hooked, r"does not compute W \+ sBA .* a hook"),
        (switched_off, "PeftModel has no active adapter: .* switched off"),
        (grouped, "only linear layers, embeddings and ungrouped convolutions"),
        (quantized, "adapts a quantized weight .*int8"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential has no active adapter"),
    ],
)
def test_what_is_no_sum_of_weight_and_product_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        adapter_norms(make())
