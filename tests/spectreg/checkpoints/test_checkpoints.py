"""Weights of checkpoints as they act: what lies beside them, scales, adapters, files that are something else."""

import json
import struct
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from spectreg import singular_values
from spectreg.measures.spectra import each_spectrum


def randn(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sigma(W):
    return torch.linalg.matrix_norm(W.double().flatten(1), 2).item()


def saved(content, folder, name="model.pt"):
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize(
    "beside",
    [
        {"rng_state": torch.get_rng_state()},
        {"step": torch.tensor(5)},
        {"queue": randn(4, 16)},
        {"queue": randn(4, 16), "ema": {"weight": randn(9, 9)}, "epoch": 3},
        {"optimizer": {"momentum": randn(9, 9)}, "scheduler": [1, 2]},
    ],
)
@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_tensors_beside_a_state_dict_neither_hide_nor_replace_it(beside, key, tmp_path):
    W = randn(4, 6)
    spectra = singular_values(saved({**beside, key: {"weight": W}}, tmp_path))
    assert list(spectra) == ["weight"]
    assert spectra["weight"].sigma == pytest.approx(sigma(W))


def test_the_only_state_dict_counts_whatever_its_key_and_several_are_refused(tmp_path):
    W = randn(4, 6)
    path = saved({"net": {"weight": W}, "rng_state": torch.get_rng_state(), "epoch": 3}, tmp_path)
    assert singular_values(path)["weight"].sigma == pytest.approx(sigma(W))
    with pytest.raises(ValueError, match="state dicts under 'g', 'd', and none under state_dict"):
        singular_values(saved({"g": {"weight": W}, "d": {"weight": W}}, tmp_path))
    with pytest.raises(ValueError, match="weights, and beside them state dicts under 'net'"):
        singular_values(saved({"net": {"weight": W}, "queue": W}, tmp_path))


def block_scaled(W, block, dtype):
    """Codes, scales, and the weight that they stand for; the last blocks may be smaller."""
    codes, acts = torch.empty(W.shape, dtype=dtype), torch.empty(W.shape, dtype=torch.float64)
    rows, columns = (-(-size // b) for size, b in zip(W.shape, block, strict=True))
    scale = torch.empty(rows, columns)
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = W[part].abs().max() / largest
            values = W[part] / scale[i, j]
            codes[part] = (values.round() if dtype == torch.int8 else values).to(dtype)
            acts[part] = codes[part].double() * scale[i, j].double()
    return codes, scale, acts


@given(
    rows=st.integers(2, 300),
    columns=st.integers(2, 300),
    kind=st.sampled_from(["blocks", "channels", "groups", "tensor"]),
    dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]),
    suffix=st.sampled_from(["_scale_inv", "_scale"]),
)
@settings(max_examples=40, deadline=None)
def test_codes_count_times_their_scales(rows, columns, kind, dtype, suffix):
    W = randn(rows, columns)
    W[: rows // 2] *= 30
    block = {"blocks": (128, 128), "channels": (1, columns), "groups": (1, 32), "tensor": (rows, columns)}[kind]
    codes, scale, acts = block_scaled(W, block, dtype)
    if kind == "tensor":
        scale = scale.reshape(())
    state = {"up.weight": codes, f"up.weight{suffix}": scale}
    skipped: dict[str, str] = {}
    (spectrum,) = each_spectrum(state, skipped=skipped)
    assert spectrum.name == "up.weight"
    assert spectrum.sigma == pytest.approx(sigma(acts), rel=1e-5)
    assert skipped == {f"up.weight{suffix}": "belongs to 'up.weight'"}


def test_one_dimensional_scales_are_of_the_channels_and_zero_points_are_taken_off():
    codes = torch.randint(-128, 127, (6, 6), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale, zero = randn(6).abs(), torch.arange(6, dtype=torch.int8)
    state = {"w.weight": codes, "w.weight_scale": scale, "w.weight_zero_point": zero}
    acts = (codes.double() - zero.double()[:, None]) * scale.double()[:, None]
    assert singular_values(state)["w.weight"].sigma == pytest.approx(sigma(acts), rel=1e-6)
    state = {"w.weight": codes, "w.SCB": scale}
    assert singular_values(state)["w.weight"].sigma == pytest.approx(sigma(codes * scale[:, None] / 127), rel=1e-6)


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"w.weight": torch.ones(2, 2, dtype=torch.int8)}, "int8 without a scale"),
        (
            {"w.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "w.scale_b": torch.ones(2)},
            "scales of an unknown kind",
        ),
        (
            {"w.weight": torch.ones(4, 4, dtype=torch.int8), "w.weight_scale": torch.ones(3, 1)},
            "3 scales for 4 entries",
        ),
        (
            {"w.weight": torch.ones(4, 4, dtype=torch.int8), "w.weight_scale": torch.ones(4), "w.SCB": torch.ones(4)},
            r"several scales: w.weight_scale, w.SCB",
        ),
        ({"w.weight": torch.ones(8, 4, dtype=torch.int8), "w.weight_scale": torch.ones(4)}, "scales of shape (4,)"),
        ({"w.weight": torch.ones(8, 1, dtype=torch.uint8), "w.weight.absmax": torch.ones(2, 2)}, "packed in uint8"),
        ({"w.qweight": torch.ones(8, 1, dtype=torch.int32), "w.scales": torch.ones(2, 2)}, "packed in int32"),
        ({"w.weight": torch.ones(2, 2, dtype=torch.complex64)}, "complex64"),
        ({"w.weight": torch.ones(2, 2).to_sparse()}, "torch.sparse_coo"),
        ({"w.weight": torch.ones(2, 2, device="meta")}, "on the meta device"),
        ({"w.weight": torch.ones(2, dtype=torch.float16)}, "1 dimension"),
        ({"w.weight": torch.ones(2, 2, dtype=torch.int64)}, "int64"),
    ],
)
def test_what_cannot_be_measured_is_listed_with_the_reason_and_nothing_is_measured_in_its_place(beside, reason):
    skipped: dict[str, str] = {}
    assert [s.name for s in each_spectrum({**beside, "other.weight": torch.eye(3)}, skipped=skipped)] == [
        "other.weight"
    ]
    assert reason in skipped[next(iter(beside))]
    assert set(skipped) == set(beside)
    with pytest.raises(ValueError, match=r"no weight to measure: .*'w\."):
        singular_values(beside)


def test_fp8_without_any_scale_is_what_it_says():
    codes = randn(5, 7).to(torch.float8_e4m3fn)
    for top in (None, 1):
        assert singular_values({"w": codes}, top=top)["w"].sigma == pytest.approx(sigma(codes), rel=1e-6)


def test_experts_are_a_matrix_each_unless_they_are_to_be_one():
    W = randn(3, 4, 5)
    spectrum = singular_values({"mlp.experts.up_proj": W})["mlp.experts.up_proj"]
    assert spectrum.shape == (3, 4, 5)
    assert spectrum.sigma == pytest.approx(max(sigma(w) for w in W))
    joint = singular_values({"mlp.experts.up_proj": W}, map="joint")["mlp.experts.up_proj"]
    assert joint.sigma == pytest.approx(sigma(W))


def test_the_adapters_that_peft_writes_are_their_product_and_with_the_base_the_merged_weight(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    for i, options in enumerate(({}, {"use_rslora": True}, {"alpha_pattern": {"1": 7}})):
        base = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(2, 3, 3), nn.Linear(5, 4))
        state = {name: value.clone() for name, value in base.state_dict().items()}
        config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0", "1"], init_lora_weights=False, **options)
        model = peft.get_peft_model(base, config)
        folder = tmp_path / str(i)
        model.save_pretrained(folder)
        merged = model.merge_and_unload().state_dict()
        changes, weights = (singular_values(folder / "adapter_model.safetensors", base=b) for b in (None, state))
        assert sorted(changes) == ["0.lora", "1.lora"]
        assert sorted(weights) == ["0.weight", "1.weight"]
        for name, spectrum in weights.items():
            assert spectrum.sigma == pytest.approx(sigma(merged[name]), rel=1e-5)
            change = merged[name].double() - state[name].double()
            assert changes[name.replace("weight", "lora")].sigma == pytest.approx(sigma(change), rel=1e-5)


def test_an_adapter_needs_its_scale_and_a_base_with_its_layers():
    A, B = randn(2, 6), randn(5, 2, seed=1)
    of_peft = {"fc.lora_A.weight": A, "fc.lora_B.weight": B}
    with pytest.raises(ValueError, match=r"lora_alpha/r is not known: keep adapter_config\.json"):
        singular_values(of_peft)
    stored = {"fc.lora_down.weight": A, "fc.lora_up.weight": B, "fc.alpha": torch.tensor(1.0)}
    assert singular_values(stored)["fc.lora"].sigma == pytest.approx(sigma(B @ A) / 2)
    W = randn(5, 6, seed=2)
    whole = singular_values(stored, base={"model.fc.weight": W})["fc.weight"]
    assert whole.sigma == pytest.approx(sigma(W + B @ A / 2))
    with pytest.raises(ValueError, match=r"the base has 0 weights that could be 'fc\.weight'"):
        singular_values(stored, base={"other.weight": W})
    with pytest.raises(ValueError, match=r"the adapter is \(5, 6\), the weight in the base \(6, 5\)"):
        singular_values(stored, base={"fc.weight": W.T})
    own = {**stored, "fc.base_layer.weight": W}
    assert list(singular_values(own)) == ["fc.weight"]
    assert singular_values(own)["fc.weight"].sigma == pytest.approx(sigma(W + B @ A / 2))


def write_gguf(folder):
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    return folder / "model.gguf"


def write_script(folder):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(folder / "model.pt")
    return folder / "model.pt"


def write_archive(folder):
    with zipfile.ZipFile(folder / "model.npz", "w") as archive:
        archive.writestr("weight.npy", b"")
    return folder / "model.npz"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_gguf, r"is a GGUF file: read it with the gguf package"),
        (write_script, r"is a TorchScript program: save torch\.jit\.load\(path\)\.state_dict\(\)"),
        (write_archive, "is a zip archive without a checkpoint"),
    ],
)
def test_a_file_of_another_format_is_named(write, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        singular_values(write(tmp_path))


@pytest.mark.parametrize("shard", ["model.index.json", 3, None, "", ["a"], {"b": 1}, True])
def test_an_index_with_something_that_is_no_shard_is_named(shard, tmp_path):
    path = tmp_path / "model.index.json"
    path.write_text(json.dumps({"weight_map": {"weight": shard}}))
    with pytest.raises(ValueError, match=r"is not the name of a shard|has no 'weight_map'"):
        singular_values(path)


def test_a_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder"):
        singular_values(tmp_path)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("top", [None, 1, 2])
def test_the_units_of_a_weight_only_scale_its_spectrum(scale, top, tmp_path):
    W = randn(40, 60)
    save_file({"weight": W * scale}, tmp_path / "model.safetensors")
    ours = singular_values(tmp_path / "model.safetensors", top=top)["weight"]
    plain = singular_values({"weight": W}, top=top)["weight"]
    torch.testing.assert_close(ours.values, scale * plain.values, rtol=1e-6, atol=0)
    assert ours.converged
    assert ours.stable_rank == pytest.approx(plain.stable_rank, rel=1e-6)


def test_a_model_without_values_names_the_weight():
    with pytest.raises(ValueError, match="weight 'weight' is on the meta device"):
        singular_values(nn.Linear(3, 4, device="meta"))


def test_several_adapters_of_a_layer_are_told_apart_by_their_names():
    A, B, W = randn(2, 6), randn(5, 2, seed=1), randn(5, 6, seed=2)
    state = {"fc.lora_down.first.weight": A, "fc.lora_up.first.weight": B}
    state |= {"fc.lora_down.second.weight": 2 * A, "fc.lora_up.second.weight": B}
    changes = singular_values(state)
    assert list(changes) == ["fc.lora.first", "fc.lora.second"]
    assert [s.sigma for s in changes.values()] == pytest.approx([sigma(B @ A), 2 * sigma(B @ A)])
    whole = singular_values(state, base={"fc.weight": W})
    assert list(whole) == ["fc.weight.first", "fc.weight.second"]
    assert [s.sigma for s in whole.values()] == pytest.approx([sigma(W + B @ A), sigma(W + 2 * B @ A)])


def test_a_base_that_nothing_adapts_is_refused():
    with pytest.raises(ValueError, match=r"there is no adapter here: leave it out"):
        singular_values({"weight": randn(3, 4)}, base={"weight": randn(3, 4)})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"lora_alpha": "4"}, "adapter_config.json has '4' for lora_alpha"),
        ({"lora_alpha": True}, "has True for lora_alpha"),
        ({"lora_alpha": float("nan")}, "has nan for lora_alpha"),
        ({"lora_alpha": 4, "alpha_pattern": ["fc"]}, r"alpha_pattern of adapter_config.json is \['fc'\]"),
        ({"lora_alpha": 4, "alpha_pattern": {"(": 2}}, r"is \{'\(': 2\}: no map of patterns"),
        ({"lora_alpha": 4, "alpha_pattern": {"fc": "2"}}, "has '2' for lora_alpha"),
        ({"lora_alpha": 4, "use_dora": True}, "DoRA, which is more than the product of two factors"),
    ],
)
def test_a_configuration_that_does_not_say_the_scale_is_named(config, reason, tmp_path):
    save_file(
        {"fc.lora_A.weight": randn(2, 6), "fc.lora_B.weight": randn(5, 2)}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        singular_values(tmp_path / "adapter_model.safetensors")


OTHERS = {
    "Tucker": ({"x.lora_down.weight": randn(2, 5, 1, 1), "x.lora_mid.weight": randn(2, 2, 3, 3),
                "x.lora_up.weight": randn(4, 2, 1, 1)}, "LoCon"),
    "DoRA": ({"x.lora_down.weight": randn(2, 5), "x.lora_up.weight": randn(4, 2), "x.dora_scale": randn(1, 5)}, "DoRA"),
    "AdaLoRA": ({"x.lora_A": randn(2, 5), "x.lora_B": randn(4, 2), "x.lora_E": randn(2, 1)}, "AdaLoRA"),
    "LoHa": ({"x.hada_w1_a": randn(4, 2), "x.hada_w1_b": randn(2, 5), "x.hada_w2_a": randn(4, 2),
              "x.hada_w2_b": randn(2, 5)}, "LoHa"),
    "LoKr": ({"x.lokr_w1": randn(2, 2), "x.lokr_w2": randn(3, 3)}, "LoKr"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_adapters_of_other_kinds_are_refused_by_name_and_no_part_of_them_is_measured(name):
    tensors, kind = OTHERS[name]
    with pytest.raises(ValueError, match=f"no weight to measure.*{kind}"):
        singular_values(tensors)
    skipped = next(iter(each_spectrum({**tensors, "y.weight": randn(3, 3)})))
    assert skipped.name == "y.weight"


def test_layers_whose_names_only_begin_as_those_of_adapters_do_are_weights():
    names = [
        "encoder.vera_proj",
        "model.oft_head",
        "hada_layer",
        "model.lokr_x",
        "lora_middle",
        "lora_Encoder",
        "boft_x",
    ]
    assert list(singular_values({f"{name}.weight": randn(3, 4) for name in names})) == [f"{n}.weight" for n in names]


@pytest.mark.parametrize("kind", ["lora", None])
def test_a_configuration_of_plain_lora_is_one_however_it_says_so(kind, tmp_path):
    A, B = randn(2, 5), randn(4, 2)
    save_file({"base_model.model.fc.lora_A.weight": A, "base_model.model.fc.lora_B.weight": B},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "lora_alpha": 2, "r": 2}))
    spectra = singular_values(tmp_path / "adapter_model.safetensors")
    assert spectra["fc.lora"].sigma == pytest.approx(sigma(B @ A))


def test_an_adapter_whose_configuration_names_another_kind_is_refused(tmp_path):
    save_file({"base_model.model.fc.lora_A.weight": randn(2, 5), "base_model.model.fc.lora_B.weight": randn(4, 2)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    configuration = {"peft_type": "RANDLORA", "lora_alpha": 2, "r": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(configuration))
    with pytest.raises(ValueError, match="RANDLORA"):
        singular_values(tmp_path / "adapter_model.safetensors")


def _adapted_by_peft(model, folder, **settings):
    """The file of an adapter with generic factors, and the model with it as peft loads it."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.3 * randn(*parameter.shape))
    adapted.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(randn(4, 6, 8))

    def forward(self, x):
        return torch.einsum("eoi,bi->bo", self.up, x)


@pytest.mark.parametrize("kind", ["KaSA", "BD-LoRA", "a matrix for each expert"])
def test_variants_that_only_the_configuration_tells_are_refused_by_name(kind, tmp_path):
    peft = pytest.importorskip("peft")
    lora = pytest.importorskip("peft.tuners.lora.config")
    settings = {"a matrix for each expert": {"target_modules": [], "target_parameters": ["experts.up"]}}
    if hasattr(lora, "KasaConfig"):
        settings["KaSA"] = {"target_modules": ["fc"], "kasa_config": lora.KasaConfig()}
    if hasattr(lora, "BdLoraConfig"):
        blocks = lora.BdLoraConfig(target_modules_bd_a=["fc"], nblocks=2)
        settings["BD-LoRA"] = {"target_modules": ["fc"], "use_bdlora": blocks}
    if kind not in settings:
        pytest.skip(f"peft {peft.__version__} has no {kind}")
    model = nn.ModuleDict({"fc": nn.Linear(8, 8, bias=False), "experts": Experts()})
    with pytest.raises(ValueError, match=kind):
        singular_values(_adapted_by_peft(model, tmp_path, **settings[kind]))


def test_an_adapter_that_began_as_part_of_the_weight_is_measured_alone_and_not_added_to_it(tmp_path):
    model = nn.ModuleDict({"fc": nn.Linear(8, 8, bias=False)})
    base = {name: value.clone() for name, value in model.state_dict().items()}
    file = _adapted_by_peft(model, tmp_path, target_modules=["fc"], init_lora_weights="pissa")
    assert list(singular_values(file)) == ["fc.lora"]
    with pytest.raises(ValueError, match="init_lora_weights is 'pissa'"):
        singular_values(file, base=base)


@pytest.mark.parametrize("targets", [["wide", "square", "head"], ["wide", "square", "table"]], ids=" ".join)
def test_whether_a_weight_is_stored_turned_is_told_by_its_shape_and_not_by_one_setting_for_all(targets, tmp_path):
    peft = pytest.importorskip("peft")
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"wide": Conv1D(9, 6), "square": Conv1D(6, 6), "head": nn.Linear(6, 5), "table": nn.Embedding(6, 6)}
    )
    base = {name: value.clone() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False, fan_in_fan_out="head" not in targets
    )
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    true, skipped = adapted.merge_and_unload().state_dict(), {}
    spectra = each_spectrum(tmp_path / "adapter_model.safetensors", base=base, skipped=skipped)
    found = {spectrum.name: spectrum for spectrum in spectra}
    for target in targets:
        if target == "square" and "head" in targets:  # nothing in the file tells
            assert f"{target}.weight" not in found
            assert any("fan_in_fan_out" in why for why in skipped.values())
        else:
            assert found[f"{target}.weight"].sigma == pytest.approx(sigma(true[f"{target}.weight"]), rel=1e-5)


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6)])
def test_a_tensor_of_a_dtype_that_is_not_known_stops_no_other(tmp_path, dtype, bits):
    header, end = {}, 0
    for name, kind, size in (("known", "F32", 64), ("odd", dtype, 2 * bits)):
        header[name] = {"dtype": kind, "shape": [4, 4], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    skipped: dict[str, str] = {}
    assert [spectrum.name for spectrum in each_spectrum(path, skipped=skipped)] == ["known"]
    assert list(skipped) == ["odd"]
    assert ("packed in float4" if bits == 4 else "this safetensors cannot read it") in skipped["odd"]
