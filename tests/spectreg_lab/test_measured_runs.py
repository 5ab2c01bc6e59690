import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from spectreg.measures import hessian
from spectreg_lab import measures
from spectreg_lab.cli import CommandError, app
from spectreg_lab.data import load
from spectreg_lab.settings.config import Data, Measuring
from spectreg_lab.storage.checkpoints import Checkpoint
from spectreg_lab.storage.errors import RunError
from spectreg_lab.storage.run_folder import RunFolder
from spectreg_lab.training.runs import measure, run
from spectreg_lab.training.train import Training

QUICK = Measuring(examples=12, radii=(0.5, 1.0), steps=2)

MEASURED = {"input_gradient", "hessian", "jacobian", "perturbation", "spectra", "taken_with"}


@pytest.fixture
def trained(tiny, fabric):
    training = Training(tiny(), load(tiny().data), fabric)
    training.epoch(1)
    return training


def test_the_sample_is_the_same_images_every_time_and_from_all_over_the_split():
    split = load(Data()).test
    one, again = (torch.cat([y for _, y in measures.sample(split, 50, batch=20)]) for _ in range(2))
    assert torch.equal(one, again)
    assert len(one) == 50
    assert not torch.equal(one, split.labels[:50])


def test_measuring_leaves_weights_statistics_and_mode_as_they_were(trained):
    trained.model.train()
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    torch.manual_seed(7)
    draws = torch.get_rng_state()
    measures.after(trained.model, load(trained.config.data), QUICK)
    assert torch.equal(torch.get_rng_state(), draws)
    assert trained.model.training
    assert all(torch.equal(before[name], value) for name, value in trained.model.state_dict().items())


def test_what_is_measured_equals_what_torch_and_numpy_say(trained):
    images = load(trained.config.data)
    found = measures.after(trained.model, images, QUICK)
    for name, values in found["spectra"].items():
        weight = trained.model.get_parameter(name).detach().flatten(1).double().numpy()
        np.testing.assert_allclose(values, np.linalg.svd(weight, compute_uv=False), rtol=1e-5, atol=1e-6)
    trained.model.eval()
    ((x, y),) = measures.sample(images.test, 12)
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(trained.model(x), y, reduction="sum"), x)
    assert found["input_gradient"]["test"] == pytest.approx(gradient.flatten(1).norm(dim=1).mean().item(), rel=1e-4)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: trained.model(one[None])[0]))(x.detach()).flatten(2)
    np.testing.assert_allclose(found["jacobian"]["norms"], torch.linalg.matrix_norm(jacobian, 2).tolist(), rtol=1e-3)
    assert max(found["jacobian"]["norms"]) <= found["jacobian"]["bound"]
    assert [point["radius"] for point in found["perturbation"]["pgd"]] == [0.5, 1.0]
    assert found["hessian"]["train"]["converged"]


def test_a_run_that_asks_for_measures_has_them_as_curves_and_at_the_end(tmp_path, tiny):
    setting = {"every": 2, "curves": ["input_gradient"], "examples": 12, "radii": [0.5], "steps": 1}
    run(tiny(epochs=5, measure=setting), tmp_path)
    place = RunFolder(tmp_path)
    assert [line["epoch"] for line in place.metrics() if "input_gradient" in line] == [2, 4]
    assert set(place.measures()) == MEASURED
    taken = {"train_images": 12, "test_images": 12, "radii": [0.5], "steps": 1, "restarts": 1}
    assert place.measures()["taken_with"] == taken | {"perturbations": ["random", "gradient", "pgd"]}


def test_as_many_images_are_recorded_as_there_were(trained):
    taken = measures.after(trained.model, load(trained.config.data), QUICK.model_copy(update={"examples": 50}))
    assert (taken["taken_with"]["train_images"], taken["taken_with"]["test_images"]) == (50, 40)
    assert len(taken["jacobian"]["norms"]) == 40


def test_measuring_does_not_change_what_is_learned(tmp_path, tiny):
    quick = {"every": 1, "examples": 8, "radii": [0.5], "steps": 1}
    run(tiny(epochs=2), tmp_path / "plain")
    run(tiny(epochs=2, measure=quick), tmp_path / "measured")
    plain, measured = (RunFolder(tmp_path / name).resume().tensors for name in ("plain", "measured"))
    assert all(torch.equal(plain[key], measured[key]) for key in plain)


def test_a_finished_run_is_measured_once(tmp_path, tiny):
    run(tiny(epochs=1), tmp_path)
    assert measure(tmp_path, QUICK)
    assert not measure(tmp_path, QUICK)


def test_only_a_finished_run_can_be_measured(tmp_path, tiny):
    with pytest.raises(RunError, match="not a run folder"):
        measure(tmp_path)
    run(tiny(learning_rate=1e30), tmp_path / "failed")
    with pytest.raises(RunError, match="not a finished run"):
        measure(tmp_path / "failed")


def test_measuring_a_run_without_its_weights_is_refused_and_changes_nothing(tmp_path, tiny):
    run(tiny(epochs=2), tmp_path)
    for path in tmp_path.glob("checkpoint-*"):
        path.unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunError, match="has no weights to measure"):
        measure(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert RunFolder(tmp_path).finished()


def test_weights_before_the_last_epoch_are_not_measured_in_its_place(tmp_path, tiny):
    run(tiny(epochs=2), tmp_path)
    place = RunFolder(tmp_path)
    (tmp_path / "checkpoint-2.safetensors").unlink()
    place.save(Checkpoint(1, {"model/w": torch.zeros(1)}))
    with pytest.raises(RunError, match="has the weights of epoch 1 of 2, not the last ones"):
        measure(tmp_path)


def test_an_interrupt_while_measuring_passes_through_and_nothing_is_stored(tmp_path, tiny, monkeypatch):
    run(tiny(epochs=1), tmp_path)
    real, calls = hessian.product_with, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(hessian, "product_with", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, QUICK)
    assert RunFolder(tmp_path).measures() is None
    monkeypatch.undo()
    assert measure(tmp_path, QUICK)


def test_one_run_that_cannot_be_measured_does_not_keep_the_others_from_it(tmp_path, tiny):
    for seed in (0, 1):
        run(tiny(epochs=1, seed=seed), tmp_path / f"run-{seed}")
    (tmp_path / "run-0" / "checkpoint-1.safetensors").unlink()
    result = CliRunner().invoke(app, ["measure", str(tmp_path), "--examples", "8"])
    assert "1 runs measured" in result.output
    assert isinstance(result.exception, CommandError)
    assert "run-0 has no weights to measure" in str(result.exception)


def test_the_command_measures_a_run_or_all_of_them_and_skips_what_is_there(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        run(tiny(epochs=1, seed=seed), tmp_path / "runs" / "study" / f"run-{seed}")
    first = CliRunner().invoke(app, ["measure", "runs/study/run-0", "--examples", "8"])
    assert "1 runs measured, 0 had been before" in first.output
    rest = CliRunner().invoke(app, ["measure", "all", "--examples", "8"])
    assert "1 runs measured, 1 had been before" in rest.output
    found = [RunFolder(tmp_path / "runs" / "study" / f"run-{seed}").measures() for seed in (0, 1)]
    assert all(set(one) == MEASURED for one in found)


@pytest.mark.slow
@pytest.mark.photographs
def test_a_network_of_photographs_is_measured_too(few_photographs, tmp_path, tiny):
    data = Data(name=str(few_photographs), train_size=200, test_size=100)
    run(tiny(epochs=1, data=data), tmp_path)
    assert measure(tmp_path, QUICK)
    found = RunFolder(tmp_path).measures()
    assert max(found["jacobian"]["norms"]) <= found["jacobian"]["bound"]
    assert len(found["jacobian"]["norms"]) == 12
