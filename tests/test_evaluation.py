"""Batch-norm statistics from training data, and the evaluation of a whole split."""

import pytest
import torch
from torch import nn

from indrnn.data import make_task
from indrnn.layers import recurrent_layers
from indrnn.models import build_model
from indrnn.training.evaluation import Objective, batch_norms, evaluate, reestimate_batch_norm
from small_runs import READS, ArraySplit, make_small, small_config

CPU = torch.device("cpu")


def small_model(tmp_path, *overrides):
    torch.manual_seed(0)
    cfg = small_config(tmp_path, "model.dropout=0.5", *overrides)
    return build_model(cfg.model, make_task(cfg.data))


def test_statistics_equal_a_direct_computation_without_dropout(tmp_path):
    model, split = small_model(tmp_path), ArraySplit(200, 1)
    samples = torch.arange(0, 90, 2)
    reestimate_batch_norm(model, split, samples, batch_size=1000)
    x, _ = split.batch(samples)
    for (_, layer), norm in zip(recurrent_layers(model), batch_norms(model), strict=True):
        drive = x @ layer.weight_ih.T + layer.bias
        h, hs = torch.zeros(len(samples), layer.hidden_size), []
        for t in range(drive.shape[1]):
            h = torch.relu(drive[:, t] + layer.recurrent_weight() * h)
            hs.append(h)
        values = torch.stack(hs, 1).flatten(0, 1)
        torch.testing.assert_close(norm.running_mean, values.mean(0))
        torch.testing.assert_close(norm.running_var, values.var(0))
        z = (values - values.mean(0)) / (values.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
        x = z.view(x.shape[0], -1, layer.hidden_size)


def test_statistics_of_several_batches_are_averaged(tmp_path):
    model, split = small_model(tmp_path, "model.num_layers=1"), ArraySplit(200, 1)
    norm = batch_norms(model)[0]
    means, variances = [], []
    for part in (torch.arange(0, 33), torch.arange(33, 65), torch.arange(65, 97)):
        reestimate_batch_norm(model, split, part, batch_size=100)
        means.append(norm.running_mean.clone())
        variances.append(norm.running_var.clone())
    norm.running_mean.fill_(float("nan"))
    reestimate_batch_norm(model, split, torch.arange(97), batch_size=40)  # three batches of 33, 32 and 32
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))


def test_reestimation_changes_nothing_else(tmp_path):
    model, split = small_model(tmp_path), ArraySplit(200, 1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    random = torch.get_rng_state()
    reestimate_batch_norm(model, split, torch.arange(64), batch_size=32)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert [norm.momentum for norm in batch_norms(model)] == [0.1, 0.1]
    assert not any(module.training for module in model.modules())


def test_an_evaluation_weights_every_sequence_equally(tmp_path):
    model, task = small_model(tmp_path), make_small()
    split, objective = ArraySplit(71, 2), Objective(task)
    READS.clear()
    found = evaluate(model, split, objective, 30, CPU)
    assert [indices.tolist() for _, indices in READS] == [[*range(30)], [*range(30, 60)], [*range(60, 71)]]
    model.eval()
    with torch.no_grad():
        output = model(split.x)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(output, split.y)), rel=1e-6)
    assert found.correct == int((output.argmax(1) == split.y).sum())
    assert (found.accuracy, found.size) == (found.correct / 71, 71)


def test_an_evaluation_can_be_ended_between_batches(tmp_path):
    model, split = small_model(tmp_path), ArraySplit(71, 2)

    def stop():
        if len(READS) == 2:
            raise KeyError("stop")

    READS.clear()
    with pytest.raises(KeyError):
        evaluate(model, split, Objective(make_small()), 30, CPU, stop)
    assert len(READS) == 2
