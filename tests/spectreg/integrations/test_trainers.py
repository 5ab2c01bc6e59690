"""The doors to trainers and optimizers of others, each in the real thing on a small model."""

import os

import pytest
import torch
from cases import mlp
from torch import nn

from spectreg import SpectralNormRegularizer
from spectreg.integrations.groups import from_groups


def batch():
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def svd_gradient(model, strength):
    """What the penalty adds to the gradients once the vectors have converged, from full decompositions."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            U, s, Vh = torch.linalg.svd(module.weight.detach())
            module.weight.grad += strength * s[0] * torch.outer(U[:, 0], Vh[0])


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["Muon", "AdamW", "SGD"])
def test_the_optimizers_of_torch_get_the_gradient_of_the_penalty(optimizer):
    def trained(act):
        model = mlp()
        matrices = [p for p in model.parameters() if p.ndim == 2]
        kind = getattr(torch.optim, optimizer)
        steps = kind(matrices if optimizer == "Muon" else model.parameters(), lr=0.01)
        if act == "attached":
            SpectralNormRegularizer(model, 0.5, warmup=200, steps=50).attach(steps)
        for _ in range(3):
            model.zero_grad()
            model(batch()).square().mean().backward()
            if act == "by hand":
                svd_gradient(model, 0.5)
            steps.step()
        return model

    assert_same(trained("attached"), trained("by hand"))


def test_optimizers_that_step_in_the_backward_pass_act_each_on_its_own_weight():
    def trained(act):
        model = mlp()
        optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}
        if act:
            SpectralNormRegularizer(model, 0.5, warmup=200, steps=50).attach(*optimizers.values())

        def step(parameter):
            if not act and parameter.ndim == 2:
                U, s, Vh = torch.linalg.svd(parameter.detach())
                parameter.grad += 0.5 * s[0] * torch.outer(U[:, 0], Vh[0])
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            model(batch()).square().mean().backward()
        return model

    assert_same(trained(True), trained(False))


def test_accelerate_with_accumulated_gradients_acts_once_an_optimizer_step():
    accelerate = pytest.importorskip("accelerate")

    def trained(act):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer = accelerator.prepare(bare := mlp(), torch.optim.SGD(bare.parameters(), lr=0.01))
        regularizer = SpectralNormRegularizer(model, 0.5, warmup=200, steps=50)
        if act:
            regularizer.attach(optimizer)
        for i in range(6):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch()).square().mean())
                if not act and i % 2:
                    svd_gradient(bare, 0.5)
                optimizer.step()
                optimizer.zero_grad()
        calls = {saved["calls"] for saved in regularizer.state_dict()["vectors"].values()}
        assert calls == ({3} if act else {0})
        return bare

    assert_same(trained(True), trained(False))


def test_parameter_groups_say_which_weights_how_strongly_and_in_how_many_heads():
    model = mlp(widths=(5, 8, 6, 3))
    groups = [
        {"params": [model[0].weight], "spectral_strength": 0.5, "num_heads": 4},
        {"params": [model[2].weight, model[2].bias], "spectral_strength": 0.25},
        {"params": [*model[4].parameters(), model[0].bias]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    regularizer = from_groups(model, optimizer, warmup=300)
    assert [(w.name, w.map.blocks) for w in regularizer.weights] == [("0.weight", 4), ("2.weight", 1)]
    before = [model[i].weight.detach().clone() for i in (0, 2, 4)]
    optimizer.step()
    for i, strength, parts in ((0, 0.5, 4), (2, 0.25, 1), (4, 0.0, 1)):
        W = before[i // 2]
        gradient = torch.zeros_like(W)
        for part, of in zip(W.chunk(parts), gradient.chunk(parts), strict=True):
            U, s, Vh = torch.linalg.svd(part)
            of += strength * s[0] * torch.outer(U[:, 0], Vh[0])
        torch.testing.assert_close(model[i].weight, W - 0.1 * gradient)
    optimizer.param_groups[1]["spectral_strength"] = 0.0
    unmoved = model[2].weight.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(model[2].weight, unmoved)
    assert regularizer.strength == {"0.weight": 0.5, "2.weight": 0.0}


def test_groups_that_say_nothing_or_nonsense_are_refused():
    model = mlp()
    with pytest.raises(ValueError, match='no parameter group has a "spectral_strength"'):
        from_groups(model, torch.optim.SGD(model.parameters(), lr=0.1))
    groups = [{"params": model.parameters(), "spectral_strength": -1.0}]
    with pytest.raises(ValueError, match=r"strength of '0.weight' is -1.0: it must be a finite number from 0"):
        from_groups(model, torch.optim.SGD(groups, lr=0.1))


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
    )


def test_of_a_model_with_adapters_only_the_adapters_are_stepped_logged_and_saved():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    regularizer = SpectralNormRegularizer(model, 0.5, warmup=100).attach(optimizer)
    before = [torch.linalg.matrix_norm(p.detach(), 2) for p in trained]
    optimizer.step()
    for p, sigma in zip(trained, before, strict=True):
        assert torch.linalg.matrix_norm(p.detach(), 2) < sigma
    for name, p in frozen.items():
        assert torch.equal(model.get_parameter(name), p)
    for kept in (regularizer.sigma(), regularizer.state_dict()["vectors"]):
        assert len(kept) == 2
        assert all("lora_" in name for name in kept)


@pytest.mark.slow
def test_the_trainer_of_trl_steps_adapters_and_logs_their_sigma(tmp_path):
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    import datasets
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    from spectreg.integrations.transformers import SpectralNorm

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"{i}": i for i in range(32)}, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, logging_steps=1, report_to=[], use_cpu=True, per_device_train_batch_size=4,
        disable_tqdm=True, save_strategy="no", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    callback = SpectralNorm(0.5)
    trainer = trl.SFTTrainer(
        llama(), args=arguments, train_dataset=datasets.Dataset.from_dict({"text": ["1 2 3 4"] * 8}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="1", eos_token="2"),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    sigma = [name for entry in trainer.state.log_history for name in entry if name.startswith("sigma/")]
    assert len(sigma) == 2 * 2
    assert all("lora_" in name for name in sigma)
    assert {saved["calls"] for saved in callback.regularizer.state_dict()["vectors"].values()} == {2}


def test_in_a_hyperparameter_search_the_vectors_go_into_the_checkpoint_of_the_trial(tmp_path):
    pytest.importorskip("transformers")
    from transformers import TrainerState, TrainingArguments

    from spectreg.integrations.transformers import FILE, SpectralNorm

    arguments, model = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), mlp()
    callback, state = SpectralNorm(0.1), TrainerState(is_world_process_zero=True, is_hyper_param_search=True)
    callback.on_train_begin(arguments, state, None, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    state.global_step = 2
    with pytest.warns(UserWarning, match="checkpoint-2 does not exist: the vectors are not saved"):
        callback.on_save(arguments, state, None)
    folders = [tmp_path / "run-1" / "checkpoint-2", tmp_path / "run-0" / "checkpoint-2", tmp_path / "checkpoint-2"]
    for age, folder in enumerate(folders):
        folder.mkdir(parents=True)
        os.utime(folder, (1e9 - age, 1e9 - age))
    callback.on_save(arguments, state, None)
    assert [(folder / FILE).exists() for folder in folders] == [True, False, False]
    callback.on_train_end(arguments, state, None)


@pytest.mark.slow
def test_two_callbacks_of_lightning_act_on_two_networks_and_are_both_restored(tmp_path, monkeypatch):
    pl = pytest.importorskip("pytorch_lightning")
    from spectreg.integrations import lightning
    from spectreg.integrations.lightning import SpectralNorm
    from spectreg.regularizer import log_of

    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.g, self.d = mlp(), mlp(seed=1)

        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.g, self.d)]

        def training_step(self, batch, _):
            for optimizer, net in zip(self.optimizers(), (self.g, self.d), strict=True):
                optimizer.zero_grad()
                self.manual_backward(net(batch).square().mean())
                optimizer.step()

    exact = {"warmup": 200, "steps": 50}

    def fit(steps, resume=None, patterns=("g.*", "d.*")):
        callbacks = [
            SpectralNorm({patterns[0]: 0.5}, **exact),
            SpectralNorm({patterns[1]: 0.1}, penalty="hinge", **exact),
        ]
        saves = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = pl.Trainer(
            max_steps=steps, callbacks=[*callbacks, saves], accelerator="cpu", logger=False, log_every_n_steps=2,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        model = Two()
        trainer.fit(model, torch.utils.data.DataLoader(batch().repeat(4, 1), batch_size=8), ckpt_path=resume)
        return model, trainer

    logs = []
    monkeypatch.setattr(lightning, "log_of", lambda *regularizers: logs.append(regularizers) or log_of(*regularizers))
    whole, trainer = fit(8)
    assert [len(regularizers) for regularizers in logs] == [2] * 4  # both at once, at every second step of eight
    assert {"sigma/g.0.weight", "sigma/d.0.weight"} <= set(trainer.callback_metrics)
    by_hand = Two()
    regularizers = [
        SpectralNormRegularizer(by_hand.g, 0.5, **exact),
        SpectralNormRegularizer(by_hand.d, 0.1, penalty="hinge", **exact),
    ]
    for _ in range(4):  # Lightning counts the steps of both optimizers
        for net, regularizer in zip((by_hand.g, by_hand.d), regularizers, strict=True):
            net.zero_grad()
            net(batch()).square().mean().backward()
            regularizer.add_gradient()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.01 * p.grad
    assert_same(whole, by_hand)
    resumed, _ = fit(8, resume=tmp_path / "step=4.ckpt")
    assert_same(whole, resumed)
    with pytest.warns(UserWarning, match="has no vectors of SpectralNorm.*they start anew"):
        fit(8, resume=tmp_path / "step=4.ckpt", patterns=("g.[024].*", "d.[024].*"))
    assert SpectralNorm(0.1).state_key == SpectralNorm(0.2).state_key
    assert SpectralNorm(0.1, penalty=torch.exp).state_key != SpectralNorm(0.1, penalty=torch.log1p).state_key
