"""Which parameters an optimizer gets, and what is refused; learning-rate schedules against values computed by hand."""

import pytest
import torch
from omegaconf import OmegaConf

from indrnn.config.compose import load_config
from indrnn.data import make_task
from indrnn.errors import UserError
from indrnn.models import build_model
from indrnn.training.optimizer import build_optimizers, build_schedule, set_rates


def schedule(name, peak=1.0, max_steps=100, **values):
    plateau = {"restore_best": False} if name == "plateau" else {}
    return build_schedule(OmegaConf.create({"name": name, **plateau, **values}), peak, max_steps)


def test_constant():
    assert {schedule("constant").share(steps) for steps in (0, 99, 10**6)} == {1.0}


def test_staircase_drops_exactly_at_its_steps():
    staircase = schedule("staircase", every=20_000, factor=0.1)
    assert [staircase.share(steps) for steps in (0, 19_999)] == [1.0, 1.0]
    assert [staircase.share(steps) for steps in (20_000, 39_999, 40_000)] == pytest.approx([0.1, 0.1, 0.01], rel=1e-12)
    assert not staircase.finished


def test_cosine_rises_over_the_warmup_and_ends_with_the_last_update():
    cosine = schedule("cosine", max_steps=111, warmup=10 / 111, final=0.2)
    assert cosine.share(0) == pytest.approx(0.1)
    assert cosine.share(9) == pytest.approx(1.0)
    assert cosine.share(10) == pytest.approx(1.0)
    assert cosine.share(60) == pytest.approx(0.6)  # half way between 1 and 0.2
    assert cosine.share(35) == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)  # a quarter of the way: cos 45°
    assert cosine.share(110) == pytest.approx(0.2)


def test_cosine_without_warmup_starts_at_the_peak():
    assert schedule("cosine", warmup=0.0, final=0.0).share(0) == 1.0
    assert schedule("cosine", max_steps=1, warmup=0.0, final=0.0).share(0) == 1.0


def test_one_cycle_meets_its_three_ends():
    cycle = schedule("one_cycle", max_steps=101, warmup=0.5, initial=0.04, final=0.01)
    assert round(0.5 * 101) == 50
    assert cycle.share(0) == pytest.approx(0.04)
    assert cycle.share(25) == pytest.approx(0.52)  # half way up
    assert cycle.share(50) == pytest.approx(1.0)
    assert cycle.share(75) == pytest.approx(0.505)  # half way down
    assert cycle.share(100) == pytest.approx(0.01)


def test_plateau_shrinks_its_patience_and_ends_below_the_minimum():
    plateau = schedule("plateau", peak=2e-4, factor=0.1, patience=[3, 2, 1], minimum_lr=1e-6)
    rates = []
    scores = [0.5, 0.6, 0.6, 0.55, 0.6, 0.7, 0.7, 0.7, 0.7]
    for score in scores:
        plateau.observe(score)
        rates.append(plateau.share(0))
    # Evaluations 3 to 5 bring no gain (an equal score is none): a drop. The sixth is a gain; two without: a drop; then
    # one is enough for the last drop, below the minimum.
    expected = [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.001]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert plateau.finished


def test_plateau_is_not_finished_while_the_rate_equals_the_minimum():
    plateau = schedule("plateau", peak=2e-4, factor=0.1, patience=[1], minimum_lr=2e-7)
    plateau.observe(1.0)
    finished = []
    for _ in range(4):
        plateau.observe(0.0)
        finished.append(plateau.finished)
    assert finished == [False, False, False, True]


def test_plateau_goes_on_from_its_state():
    one, two = (schedule("plateau", factor=0.5, patience=[2, 1], minimum_lr=1e-6) for _ in range(2))
    scores = [-0.3, -0.2, -0.2, -0.5, -0.1, -0.4]
    for score in scores[:3]:
        one.observe(score)
    two.restore(one.state())
    for score in scores[3:]:
        one.observe(score)
        two.observe(score)
        assert one.share(0) == two.share(0)
    assert one.state() == two.state() == {"drops": 2, "waited": 0, "best": -0.1}


@pytest.mark.parametrize("restore_best", [True, False])
def test_plateau_goes_back_to_the_best_at_a_drop(restore_best):
    plateau = schedule("plateau", factor=0.1, patience=[2, 1], minimum_lr=1e-9, restore_best=restore_best)
    said = [plateau.observe(score) for score in (0.5, 0.4, 0.4, 0.6, 0.3)]
    assert said == [False, False, restore_best, False, restore_best]


def test_plateau_counts_the_first_evaluation_as_a_gain_however_bad():
    plateau = schedule("plateau", factor=0.1, patience=[1], minimum_lr=1e-9)
    plateau.observe(-1e9)
    assert plateau.state() == {"drops": 0, "waited": 0, "best": -1e9}


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match=r"schedule\.name=linear is unknown; choose from constant"):
        schedule("linear")


@pytest.mark.parametrize("model", ["indrnn", "indrnn_residual", "lstm", "gru", "mingru", "rnn"])
def test_muon_updates_the_hidden_matrices_and_adam_the_rest(model):
    two = [] if model == "indrnn_residual" else ["model.num_layers=2"]
    cfg = load_config([f"model={model}", "optimizer=muon", "data=mnist5k", *two])
    network = build_model(cfg.model, make_task(cfg.data))
    adam, muon = build_optimizers(network, cfg.optimizer)
    assert (type(adam), type(muon)) == (torch.optim.Adam, torch.optim.Muon)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    by_muon = {names[id(each)] for group in muon.param_groups for each in group["params"]}
    by_adam = {names[id(each)] for group in adam.param_groups for each in group["params"]}
    assert not by_muon & by_adam
    assert by_muon | by_adam == set(names.values())
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    one_column = {name for name, shape in shapes.items() if len(shape) == 2 and shape[1] == 1}
    matrices = {name for name, shape in shapes.items() if len(shape) == 2}
    assert by_muon == matrices - one_column - {"head.weight"}


def test_rates_of_both_optimizers_follow_the_schedule():
    cfg = load_config(["optimizer=muon", "optimizer.lr=0.01", "optimizer.muon_lr=0.5", "data=mnist5k"])
    optimizers = build_optimizers(build_model(cfg.model, make_task(cfg.data)), cfg.optimizer)
    set_rates(optimizers, 0.1)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx([0.001, 0.001, 0.05])


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("torch.optim.LBFGS", "closure"),
        ("torch.optim.SparseAdam", "dense gradients"),
        ("torch.optim.Adm", "did you mean torch.optim.Adam"),
        ("torch.nn.Linear", "not a torch.optim.Optimizer"),
        ("nowhere.Optimizer", "no module nowhere"),
    ],
)
def test_what_is_no_optimizer_of_ours_is_refused_in_one_line(target, said):
    cfg = load_config(["optimizer=custom", f"optimizer._target_={target}", "data=mnist5k"])
    with pytest.raises(UserError, match=said) as caught:
        build_optimizers(torch.nn.Linear(2, 2), cfg.optimizer)
    assert target in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_arguments_of_an_optimizer_are_refused():
    with pytest.raises(UserError, match=r"optimizer\.args\.foo"):
        load_config(["optimizer.args.foo=1", "data=mnist5k"])
    cfg = load_config(["+optimizer.args.foo=1", "data=mnist5k"])
    with pytest.raises(UserError, match="foo"):
        build_optimizers(torch.nn.Linear(2, 2), cfg.optimizer)
