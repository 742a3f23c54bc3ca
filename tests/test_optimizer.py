"""Learning-rate schedules against values computed by hand."""

import pytest
from omegaconf import OmegaConf

from indrnn.errors import UserError
from indrnn.training.optimizer import build_schedule


def schedule(name, peak=2e-4, max_steps=100, **values):
    plateau = {"restore_best": False} if name == "plateau" else {}
    return build_schedule(OmegaConf.create({"name": name, **plateau, **values}), peak, max_steps)


def test_constant():
    assert {schedule("constant").rate(steps) for steps in (0, 99, 10**6)} == {2e-4}


def test_staircase_drops_exactly_at_its_steps():
    staircase = schedule("staircase", every=20_000, factor=0.1)
    assert [staircase.rate(steps) for steps in (0, 19_999)] == [2e-4, 2e-4]
    assert [staircase.rate(steps) for steps in (20_000, 39_999, 40_000)] == pytest.approx([2e-5, 2e-5, 2e-6], rel=1e-12)
    assert not staircase.finished


def test_cosine_rises_over_the_warmup_and_ends_with_the_last_update():
    cosine = schedule("cosine", peak=1.0, max_steps=111, warmup=10 / 111, final=0.2)
    assert cosine.rate(0) == pytest.approx(0.1)
    assert cosine.rate(9) == pytest.approx(1.0)
    assert cosine.rate(10) == pytest.approx(1.0)
    assert cosine.rate(60) == pytest.approx(0.6)  # half way between 1 and 0.2
    assert cosine.rate(35) == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)  # a quarter of the way: cos 45°
    assert cosine.rate(110) == pytest.approx(0.2)


def test_cosine_without_warmup_starts_at_the_peak():
    assert schedule("cosine", peak=3.0, warmup=0.0, final=0.0).rate(0) == 3.0
    assert schedule("cosine", peak=3.0, max_steps=1, warmup=0.0, final=0.0).rate(0) == 3.0


def test_one_cycle_meets_its_three_ends():
    cycle = schedule("one_cycle", peak=1.0, max_steps=101, warmup=0.5, initial=0.04, final=0.01)
    assert round(0.5 * 101) == 50
    assert cycle.rate(0) == pytest.approx(0.04)
    assert cycle.rate(25) == pytest.approx(0.52)  # half way up
    assert cycle.rate(50) == pytest.approx(1.0)
    assert cycle.rate(75) == pytest.approx(0.505)  # half way down
    assert cycle.rate(100) == pytest.approx(0.01)


def test_plateau_shrinks_its_patience_and_ends_below_the_minimum():
    plateau = schedule("plateau", factor=0.1, patience=[3, 2, 1], minimum_lr=1e-6)
    rates = []
    scores = [0.5, 0.6, 0.6, 0.55, 0.6, 0.7, 0.7, 0.7, 0.7]
    for score in scores:
        plateau.observe(score)
        rates.append(plateau.rate(0))
    # Evaluations 3 to 5 bring no gain (an equal score is none): a drop. The sixth is a gain; two without: a drop; then
    # one is enough for the last drop, below the minimum.
    expected = [2e-4, 2e-4, 2e-4, 2e-4, 2e-5, 2e-5, 2e-5, 2e-6, 2e-7]
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
        assert one.rate(0) == two.rate(0)
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
