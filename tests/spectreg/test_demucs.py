"""The penalty that Demucs adds to its loss, in one line: 1e-5·Σσ² of every weight of 0.1 MB and more."""

import pytest
import torch
from torch import nn

from spectreg import SpectralNormRegularizer

STRENGTH = 1e-5
SMALLEST = 200  # numbers in a weight; 0.1 · 2¹⁸ in Demucs


def separator():
    """Small layers of every kind that Demucs has."""
    torch.manual_seed(0)
    return nn.ModuleDict({
        "encode": nn.Sequential(nn.Conv1d(4, 12, 8, 4), nn.GELU(), nn.Conv1d(12, 24, 1), nn.GLU(1)),
        "spectral": nn.Conv2d(6, 12, (8, 1), (4, 1)),
        "lstm": nn.LSTM(12, 12, num_layers=2, bidirectional=True),
        "linear": nn.Linear(24, 12),
        "embedding": nn.Embedding(32, 12),
        "norm": nn.GroupNorm(4, 12),
        "decode": nn.Sequential(nn.Conv1d(12, 24, 3), nn.GLU(1), nn.ConvTranspose1d(12, 4, 8, 4)),
        "spectral out": nn.ConvTranspose2d(12, 6, (8, 1), (4, 1)),
    }).double()  # fmt: skip


def matrices(model):
    """Each parameter of two or more dimensions and enough entries, laid out as Demucs lays it out, by name."""
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p.ndim > 1 and p.numel() >= SMALLEST:
                turned = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d)
                yield f"{path}.{name}", (p.transpose(0, 1) if turned else p).flatten(1)


def gradients(model, loss):
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def in_one_line(model, **settings):
    return SpectralNormRegularizer(
        model, 2 * STRENGTH, map="joint", embeddings=True, select=lambda name, p: p.numel() >= SMALLEST, **settings
    )


def test_penalty_and_gradient_are_those_of_the_exact_squares_that_demucs_sums():
    model = separator()
    exact = STRENGTH * sum(torch.linalg.matrix_norm(matrix, 2).square() for _, matrix in matrices(model))
    expected = gradients(model, exact)
    regularizer = in_one_line(model, warmup=600)
    assert [w.name for w in regularizer.weights] == list(expected) == [name for name, _ in matrices(model)]
    assert len(expected) == 16
    value = regularizer.penalty()
    torch.testing.assert_close(value, exact.detach(), rtol=1e-9, atol=0)
    found = gradients(model, value)
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4 * STRENGTH)


def test_the_estimate_of_demucs_is_within_its_own_error_of_ours():
    model = separator()
    torch.manual_seed(1)
    estimates = [torch.svd_lowrank(matrix.detach(), 5, 4)[1][0] for _, matrix in matrices(model)]
    theirs = STRENGTH * torch.stack(estimates).square().sum()
    ours = in_one_line(model, warmup=300).penalty().detach()
    assert theirs <= ours * (1 + 1e-9)
    assert theirs.item() == pytest.approx(ours.item(), rel=5e-3)


def test_every_fourth_step_takes_four_times_the_penalty_and_the_others_none():
    model = separator()
    regularizer = in_one_line(model, warmup=300, every=4)
    exact = STRENGTH * sum(torch.linalg.matrix_norm(matrix, 2).square() for _, matrix in matrices(model))
    values = [regularizer.penalty().item() for _ in range(8)]
    assert values == pytest.approx([4 * exact.item(), 0, 0, 0] * 2)
