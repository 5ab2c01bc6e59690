"""The doors to trainers, each in the real trainer: a resumed training ends where an uninterrupted one does."""

import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from cases import mlp
from torch.utils.data import DataLoader, Dataset

pytestmark = pytest.mark.slow


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def lightning_fit(folder, steps, resume=None, strength=0.1, **options):
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint

    from spectreg.integrations.lightning import SpectralNorm

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp(dtype=torch.float32)

        def training_step(self, batch, _):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    # All batches are alike: which one Lightning goes on with in the middle of an epoch is not the question here.
    data = DataLoader(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).repeat(4, 1), batch_size=4)
    callback = None if strength is None else SpectralNorm(strength)
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    callbacks = [x for x in (callback, saves) if x]
    trainer = pl.Trainer(max_steps=steps, callbacks=callbacks, log_every_n_steps=2, logger=False,
                         accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
                         default_root_dir=folder, **options)  # fmt: skip
    module = Module()
    trainer.fit(module, data, ckpt_path=resume, weights_only=True) if resume else trainer.fit(module, data)
    return module, callback, trainer


def test_lightning_resumes_to_the_weights_of_an_uninterrupted_fit_and_logs_sigma(tmp_path):
    whole, callback, trainer = lightning_fit(tmp_path, 8)
    resumed, again, _ = lightning_fit(tmp_path / "again", 8, resume=tmp_path / "step=3.ckpt")
    assert_same(whole, resumed)
    without, _, _ = lightning_fit(tmp_path, 8, strength=0.0)
    assert not torch.equal(whole.net[0].weight, without.net[0].weight)
    bare, _, _ = lightning_fit(tmp_path, 8, strength=None)
    assert_same(without, bare)
    for quantity in ("sigma", "residual", "stable_rank"):
        assert {f"{quantity}/net.0.weight", f"{quantity}/net.2.weight"} <= set(trainer.callback_metrics)
    torch.testing.assert_close(
        trainer.callback_metrics["sigma/net.0.weight"], callback.regularizer.sigma()["net.0.weight"]
    )
    assert again.regularizer.state_dict()["vectors"]["net.0.weight"]["calls"] == 8
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_lightning_with_accumulated_gradients_and_clipping_acts_once_an_optimizer_step(tmp_path):
    _, callback, _ = lightning_fit(tmp_path, 3, accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert callback.regularizer.state_dict()["vectors"]["net.0.weight"]["calls"] == 3


def test_a_lightning_callback_used_again_after_a_resumed_fit_starts_anew(tmp_path):
    lightning_fit(tmp_path, 3)
    _, callback, trainer = lightning_fit(tmp_path / "resumed", 5, resume=tmp_path / "step=3.ckpt")
    callback.on_train_start(trainer, mlp_module := trainer.lightning_module)
    assert callback.regularizer.state_dict()["vectors"]["net.0.weight"]["calls"] == 0
    callback.on_train_end(trainer, mlp_module)


class Sentences(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        tokens = torch.randint(20, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


def transformers_train(folder, resume=None, strength=0.1, extra=None):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    from spectreg.integrations.transformers import SpectralNorm

    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8))
    arguments = TrainingArguments(str(folder), max_steps=6, save_steps=3, logging_steps=2, report_to=[], use_cpu=True,
                                  per_device_train_batch_size=4, learning_rate=0.01, disable_tqdm=True)  # fmt: skip
    callback = None if strength is None else SpectralNorm(strength)
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences(),
                      callbacks=[x for x in (callback, extra) if x])  # fmt: skip
    with suppress(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume)
    return model, callback, trainer


def test_transformers_resumes_to_the_weights_of_an_uninterrupted_training_and_logs_sigma(tmp_path):
    whole, callback, trainer = transformers_train(tmp_path)
    assert any("sigma/transformer.h.0.attn.c_attn.weight" in entry for entry in trainer.state.log_history)
    resumed, again, _ = transformers_train(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert_same(whole, resumed)
    first = callback.regularizer.state_dict()["vectors"]
    for name, saved in again.regularizer.state_dict()["vectors"].items():
        assert torch.equal(saved["v"], first[name]["v"])
        assert saved["calls"] == 6
    without, _, _ = transformers_train(tmp_path / "without", strength=0.0)
    assert not torch.equal(whole.transformer.h[0].mlp.c_fc.weight, without.transformer.h[0].mlp.c_fc.weight)
    bare, _, _ = transformers_train(tmp_path / "bare", strength=None)
    assert_same(without, bare)


def test_a_transformers_callback_of_a_training_that_was_broken_off_acts_once_a_step_in_the_next(tmp_path):
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        armed = True

        def on_step_end(self, args, state, control, **given):
            if self.armed and state.global_step == 2:
                raise KeyboardInterrupt

    interrupt = Interrupt()
    _, callback, trainer = transformers_train(tmp_path, extra=interrupt)
    broken = callback.regularizer
    interrupt.armed = False
    trainer.train()
    assert broken.state_dict()["vectors"]["transformer.h.0.mlp.c_fc.weight"]["calls"] == 2
    assert callback.regularizer.state_dict()["vectors"]["transformer.h.0.mlp.c_fc.weight"]["calls"] == 6


def test_the_library_loads_no_trainer():
    code = "import sys, spectreg; assert not {'transformers', 'pytorch_lightning', 'numpy.f2py'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
