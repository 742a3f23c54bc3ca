"""Optimizers and their parameter groups; learning-rate schedules against values computed by hand."""

import math
import re
import textwrap
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from indrnn.config.compose import load_config
from indrnn.data import make_task
from indrnn.errors import UserError
from indrnn.models import build_model
from indrnn.training.optimizer import build_optimizers, build_schedule, learning_rates, set_rates
from small_runs import checkpoint_of, folder_of, run_small


def schedule(name, peak=1.0, max_steps=100, **values):
    plateau = {"restore_best": False} if name == "plateau" else {}
    return build_schedule(OmegaConf.create({"name": name, **plateau, **values}), peak, max_steps)


CASES = [
    ("constant", {}, {0: 1.0, 99: 1.0, 10**6: 1.0}),
    ("staircase", {"every": 200, "factor": 0.1}, {0: 1.0, 199: 1.0, 200: 0.1, 399: 0.1, 400: 0.01}),
    # Half way between 1 and 0.2 at step 60; a quarter of the way, cos 45°, at step 35.
    (
        "cosine",
        {"max_steps": 111, "warmup": 10 / 111, "final": 0.2},
        {0: 0.1, 9: 1.0, 10: 1.0, 35: 0.2 + 0.8 * (1 + 2**-0.5) / 2, 60: 0.6, 110: 0.2},
    ),
    ("cosine", {"warmup": 0.0, "final": 0.0}, {0: 1.0, 99: 0.0}),
    ("cosine", {"max_steps": 1, "warmup": 0.0, "final": 0.0}, {0: 1.0}),
    (
        "one_cycle",
        {"max_steps": 101, "warmup": 0.5, "initial": 0.04, "final": 0.01},
        {0: 0.04, 25: 0.52, 50: 1.0, 75: 0.505, 100: 0.01},
    ),
]


@pytest.mark.parametrize(("name", "values", "expected"), CASES)
def test_schedules_have_the_values_computed_by_hand(name, values, expected):
    share = schedule(name, **values).share
    assert {step: share(step) for step in expected} == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_plateau_shrinks_its_patience_and_ends_below_the_minimum():
    plateau = schedule("plateau", peak=2e-4, factor=0.1, patience=[3, 2, 1], minimum_lr=1e-6)
    shares = []
    for score in [0.5, 0.6, 0.6, 0.55, 0.6, 0.7, 0.7, 0.7, 0.7]:
        plateau.observe(score)
        shares.append(plateau.share(0))
    # Evaluations 3 to 5 bring no gain (an equal score is none): a drop. The sixth is a gain; two without: a drop; then
    # one is enough for the last drop, below the minimum.
    assert shares == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.001], rel=1e-9)
    assert plateau.finished


def test_plateau_is_not_finished_while_the_rate_equals_the_minimum():
    plateau = schedule("plateau", peak=2e-4, factor=0.1, patience=[1], minimum_lr=2e-7)
    plateau.observe(-1e9)  # the first evaluation is a gain, however bad
    assert plateau.state == {"drops": 0, "waited": 0, "best": -1e9}
    finished = []
    for _ in range(4):
        plateau.observe(-2e9)
        finished.append(plateau.finished)
    assert finished == [False, False, False, True]


def rising(steps):
    return lambda step: (step + 1) / steps


def wrong(value):
    return lambda step: eval(value)


def custom(target, peak=1.0, max_steps=100, **args):
    return schedule("custom", peak, max_steps, _target_=target, args=args).share


def test_custom_schedules_are_functions_of_the_step():
    assert [custom("test_optimizer.rising", steps=100)(step) for step in (0, 49, 99)] == [0.01, 0.5, 1.0]
    cosine = custom("torch.optim.lr_scheduler.CosineAnnealingLR", peak=0.4, T_max=100, eta_min=0.1)
    expected = {step: (0.1 + 0.3 * (1 + math.cos(math.pi * step / 100)) / 2) / 0.4 for step in (0, 50, 99, 10)}
    assert {step: cosine(step) for step in expected} == pytest.approx(expected, rel=1e-9)
    cycle = custom("torch.optim.lr_scheduler.OneCycleLR", peak=1e-3, max_lr=1e-3, total_steps=100)
    assert [cycle(step) for step in (0, 30)] == pytest.approx([1 / 25, 1.0], rel=1e-2)


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        ("torch.optim.lr_scheduler.ReduceLROnPlateau", {}, "metrics"),
        ("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 1.0, "total_steps": 50}, "99: ValueError"),
        ("torch.optim.lr_scheduler.StepLR", {"step": 3}, "schedule.args.*step"),
        ("torch.optim.lr_scheduler.CosineLR", {}, "no attribute 'CosineLR'"),
        ("nowhere.share", {}, "No module named 'nowhere'"),
        ("math.sqrt", {}, "math.sqrt"),
        ("test_optimizer.wrong", {"value": "-0.5"}, "at step 0 .* not -0.5"),
        ("test_optimizer.wrong", {"value": "1 if step == 0 else float('nan')"}, "at step 99 .* not nan"),
        ("test_optimizer.wrong", {"value": "None"}, "at step 0 .*TypeError"),
        ("test_optimizer.wrong", {"value": "step / 0"}, "at step 0 .*ZeroDivisionError"),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(target, args, message):
    with pytest.raises(UserError, match=message) as caught:
        custom(target, **args)
    assert "\n" not in str(caught.value)
    assert target in str(caught.value)


@pytest.mark.parametrize("model", ["indrnn", "indrnn_residual", "lstm", "gru", "mingru", "rnn"])
def test_muon_updates_the_hidden_matrices_and_adam_the_rest(model):
    two = [] if model == "indrnn_residual" else ["model.num_layers=2"]
    cfg = load_config([f"model={model}", "optimizer=muon", "data=mnist5k", *two])
    network = build_model(cfg.model, make_task(cfg.data))
    adam, muon = build_optimizers(network, cfg.optimizer)
    assert (type(adam), type(muon)) == (torch.optim.Adam, torch.optim.Muon)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    by_muon, by_adam = (
        {names[id(each)] for group in optimizer.param_groups for each in group["params"]} for optimizer in (muon, adam)
    )
    assert not by_muon & by_adam
    assert by_muon | by_adam == set(names.values())
    matrices = {name for name, each in network.named_parameters() if each.dim() == 2 and each.shape[1] > 1}
    assert by_muon == matrices - {"head.weight"}


def muon_shapes(network):
    optimizers = build_optimizers(network, load_config(["optimizer=muon", "data=mnist5k"]).optimizer)
    return [tuple(each.shape) for optimizer in optimizers[1:] for each in optimizer.param_groups[0]["params"]]


def test_input_weights_are_no_hidden_matrices():
    linear = torch.nn.Linear
    lstm = torch.nn.LSTM(2, 8, bidirectional=True)
    assert muon_shapes(torch.nn.Sequential(lstm, linear(16, 3))) == [(32, 8)] * 2
    frozen = torch.nn.Sequential(linear(2, 8), linear(8, 8), linear(8, 8), linear(8, 3))
    frozen[0].requires_grad_(False)
    assert muon_shapes(frozen) == [(8, 8)] * 2
    with pytest.raises(UserError, match="optimizer=muon: the model has no hidden matrix"):
        muon_shapes(torch.nn.Sequential(linear(8, 3), linear(3, 2)))


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_arguments_that_have_a_key_of_their_own_are_refused(key):
    cfg = load_config([f"+optimizer.args.{key}=0.1", "data=mnist5k"])
    with pytest.raises(UserError, match=f"set optimizer.{key} instead"):
        build_optimizers(torch.nn.Linear(2, 2), cfg.optimizer)


def test_the_rates_of_both_optimizers_follow_the_schedule():
    cfg = load_config(["optimizer=muon", "optimizer.lr=0.01", "optimizer.muon_lr=0.5", "data=mnist5k"])
    optimizers = build_optimizers(build_model(cfg.model, make_task(cfg.data)), cfg.optimizer)
    set_rates(optimizers, 0.1)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx([0.001, 0.001, 0.05])
    assert learning_rates(optimizers) == pytest.approx({"lr": 0.001, "muon_lr": 0.05})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.optim.LBFGS", "closure"),
        ("torch.optim.SparseAdam", "dense gradients"),
        ("torch.optim.Adm", "no attribute 'Adm'"),
        ("torch.nn.Linear", "not a torch.optim.Optimizer"),
        ("nowhere.Optimizer", "No module named 'nowhere'"),
    ],
)
def test_what_is_no_optimizer_is_refused_in_one_line(target, message):
    cfg = load_config(["optimizer=custom", f"optimizer._target_={target}", "data=mnist5k"])
    with pytest.raises(UserError, match=message) as caught:
        build_optimizers(torch.nn.Linear(2, 2), cfg.optimizer)
    assert target in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_custom_optimizer_from_outside_the_package_trains_and_is_recorded(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipe = re.search(r"write `myoptimizer.py`.*?```python\n(.*?)\n   ```", text, re.DOTALL)
    (tmp_path / "myoptimizer.py").write_text(textwrap.dedent(recipe[1]))
    monkeypatch.syspath_prepend(tmp_path)
    words = ("optimizer=custom", "optimizer._target_=myoptimizer.SignSGD", "+optimizer.args.momentum=0.5")
    run_small(tmp_path, *words, "trainer.max_steps=10", "optimizer.lr=1e-3")
    (state,) = checkpoint_of(folder_of(tmp_path))["optimizer"]
    assert {group["momentum"] for group in state["param_groups"]} == {0.5}
    assert all("average" in each for each in state["state"].values())
    with pytest.raises(UserError, match=r"optimizer\.args\.momentum: 0\.5 -> 0\.7"):
        run_small(tmp_path, *words[:2], "+optimizer.args.momentum=0.7", "trainer.max_steps=10", "optimizer.lr=1e-3")
