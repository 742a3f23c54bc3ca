"""Composition and checks: what a user requests is what runs, and a mistake is one line that says how to fix it."""

import subprocess
import sys
from itertools import zip_longest

import pytest
from omegaconf import OmegaConf

from indrnn.config.compose import CONFIG_DIR, check, load_config, result_keys
from indrnn.config.schema import SCHEMAS
from indrnn.errors import UserError


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIG_DIR / group).glob("*.yaml"))


def load(*overrides: str, **options: str):
    return load_config(list(overrides), **options)


def refusal(*overrides: str, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*overrides, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_default_is_the_tutorial_protocol():
    cfg = load_config()
    assert (cfg.model.name, cfg.model.num_layers, cfg.model.hidden_size) == ("indrnn", 6, 128)
    assert (cfg.model.gamma, cfg.model.constraint, cfg.model.norm, cfg.model.dropout) == (2.0, "clip", "batch", 0.0)
    assert (cfg.optimizer.name, cfg.optimizer.lr, cfg.optimizer.weight_decay) == ("adam", 2e-4, 0.0)
    assert (cfg.schedule.name, cfg.schedule.every, cfg.schedule.factor) == ("staircase", 600_000, 0.1)
    trainer = cfg.trainer
    assert (trainer.batch_size, trainer.max_steps, trainer.eval_every) == (32, 60_000, 1000)
    assert (trainer.clip_norm, trainer.clip_value, trainer.target_accuracy) == (5.0, None, 0.99)
    assert (cfg.data.name, cfg.data.validation_size) == ("mnist", 5000)


def test_paper_protocol_is_that_of_the_papers_code():
    tutorial, paper = result_keys(load_config()), result_keys(load("experiment=paper"))
    assert {key: value for key, value in paper.items() if tutorial.get(key) != value} == {
        "name": "paper_indrnn", "data.validation_size": 3000,
        "model.gamma": 5.0, "model.constraint": "project", "model.dropout": 0.1, "model.weight_init": "kaiming",
        "optimizer.weight_decay": 1e-4, "schedule.name": "plateau", "schedule.patience": [100, 50, 25],
        "schedule.minimum_lr": 1e-6, "schedule.restore_best": True, "trainer.max_steps": 2_000_000,
        "trainer.eval_every": 1700, "trainer.clip_norm": None, "trainer.clip_value": 10.0,
        "trainer.target_accuracy": None,
    }  # fmt: skip


def test_experiments_set_values_of_single_networks():
    study = load("experiment=length_study", "schedule=one_cycle")
    assert (study.model.num_layers, study.model.norm, study.model.last_layer_fixed) == (2, "none", 1.0)
    assert load("experiment=length_study", "optimizer=muon").optimizer.muon_lr == 7.28e-3
    assert load("experiment=length_study", "model=lstm_chrono").optimizer.lr == 7.07e-3
    indrnn, lstm = load("experiment=fast"), load("experiment=fast", "model=lstm_chrono")
    assert (indrnn.optimizer.lr, indrnn.optimizer.muon_lr, indrnn.schedule.warmup) == (2e-3, 0.02, 0.3)
    assert (lstm.optimizer.lr, lstm.optimizer.muon_lr, lstm.trainer.clip_norm) == (6.92e-3, 0.0174, 0.5)


@pytest.mark.parametrize("experiment", [None, *choices("experiment")])
def test_every_experiment_runs_every_model_under_its_own_name(experiment):
    words = [f"experiment={experiment}"] * (experiment is not None)
    trainer = load(*words).trainer
    for model in choices("model"):
        cfg = load(*words, f"model={model}")
        assert cfg.name == (f"{experiment}_{model}" if experiment else model)
        tuned = {"clip_norm": 0.5} if experiment in ("fast", "long") and model in ("lstm", "lstm_chrono") else {}
        assert {**cfg.trainer} == {**trainer, **tuned}


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_accepts_another_schedule_or_optimizer(experiment):
    for model in ("indrnn", "lstm_chrono"):
        for schedule, optimizer in zip_longest(choices("schedule"), choices("optimizer"), fillvalue="sgd"):
            schedule = "constant" if schedule in ("sgd", "custom") else schedule
            target = ["optimizer._target_=torch.optim.RMSprop"] * (optimizer == "custom")
            words = [f"experiment={experiment}", f"model={model}", f"optimizer={optimizer}", f"schedule={schedule}"]
            assert load(*words, *target).optimizer.name == optimizer


def test_mnist_folder_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("INDRNN_DATA", "/elsewhere")
    assert load("data=mnist_permuted").data.root == "/elsewhere"


def test_own_files_add_choices_and_name_the_run(tmp_path):
    for file, text in {
        "model/wide": "defaults: [lstm, _self_]\nhidden_size: 300\n",
        "experiment/short": "# @package _global_\ndefaults: [paper, _self_]\ntrainer: {max_steps: 7}\n",
        "mine": "defaults: [train, _self_]\nseed: 7\n",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.yaml").write_text(text)
    for words, name in (
        (["model=wide"], "wide"),
        (["experiment=short"], "short_indrnn"),
        (["experiment=demo", "model=wide"], "demo_wide"),
        (["model=wide", "name=mine"], "mine"),
    ):
        assert load(*words, config_dir=str(tmp_path)).name == name
    cfg = load("model=wide", config_name="mine", config_dir=str(tmp_path))
    assert (cfg.name, cfg.seed, cfg.model.hidden_size) == ("mine_wide", 7, 300)


@pytest.mark.parametrize(
    "text", ["5e41726", "0x10", "1_000", "12e3", "1.10", "007", "-1", "+5", "true", "False", "nan", "inf", "8e-2b"]
)
def test_text_keys_keep_their_text(text):
    keys = ["tag", "name", "output_root", "data.mirror", "optimizer._target_"]
    cfg = load(*(f"{key}={text}" for key in keys), "data.root=~/data")
    assert [OmegaConf.select(cfg, key) for key in keys] == [text] * 5
    assert cfg.data.root == "~/data"
    assert f"data.permutation={text} " in refusal(f"data.permutation={text}")


@pytest.mark.parametrize("text", ["5e41726", "1_000", "0x10", "007", "1.10", "true", "[a]"])
def test_number_in_a_file_is_refused_as_a_text(tmp_path, text):
    (tmp_path / "experiment").mkdir()
    for key in ("tag", "name", "output_root"):
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{key}: {text}\n")
        assert f"{key}=" in refusal("experiment=mine", config_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("typed", "tag"),
    [("null", None), ("'null'", "null"), ("'5e4'", "5e4"), ('"a,5"', "a,5"), (r"a\,5", "a,5"),
     ("s-${seed}", "s-0"), ("${seed}", "0"),
     ("${model.last_layer_fixed}", None), ("${optimizer.lr}", "0.0002"),
     ("${oc.env:NO_SUCH_VARIABLE,5}", "5"), (" 1e5 ", "1e5")],
)  # fmt: skip
def test_quoted_and_special_values_of_text_keys_keep_their_meaning(typed, tag):
    assert load(f"tag={typed}").tag == tag


def test_load_config_works_inside_another_hydra_application(tmp_path):
    (tmp_path / "conf.yaml").write_text("x: ${hydra:job.name}\n")
    (tmp_path / "app.py").write_text(
        "import hydra\n"
        "from hydra.core.hydra_config import HydraConfig\n"
        "from indrnn.config.compose import load_config\n"
        "@hydra.main(version_base=None, config_path='.', config_name='conf')\n"
        "def main(cfg):\n"
        "    print(load_config(['model=lstm', 'seed=3']).name, cfg.x, HydraConfig.get().job.num)\n"
        "main()\n"
    )
    words = [sys.executable, "app.py", "-m", "x=1,2"]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert [line for line in ended.stdout.splitlines() if line.startswith("lstm")] == ["lstm 1 0", "lstm 2 1"], ended


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # unknown keys and choices
        *((f"{plus}optimizer.lrr=1", "did you mean optimizer.lr") for plus in ("", "+", "++")),
        ("lr=1", "did you mean optimizer.lr"), ("layers=3", "did you mean model.num_layers"),
        ("modl=lstm", "did you mean model"), ("sede=1", "did you mean seed"),
        ("train.max_steps=3", "did you mean trainer.max_steps"), ("++zzz=1", "zzz"), ("+zzz={}", "zzz"),
        ("model=lstm model.gamma=3", "belongs to model=indrnn"), ("+model.args.x=1", "model.args"),
        ("optimizer.args.beta=1", "+optimizer.args.beta=1"),
        ("model=lsmt", "choose one of gru, "), ("experiment=nothing_like_it", "length_study"),
        ("hydra/launcher=joblb", "hydra/launcher"), ("hydra.nothing=1", "hydra.nothing"),
        *((f"+{group}.brandnew=1", f"{group}.brandnew") for group in SCHEMAS),
        # what must exist exactly once
        ("~seed", "seed"), ("~optimizer.lr", "optimizer.lr"), ("~tagg", "tagg"), ("+model=lstm", "model"),
        ("optimizer.name=sgd", "with optimizer=..."), ("model=lstm ++model.name=gru", "with model=..."),
        # types and syntax
        *((override, override.split("=")[0])
          for override in ("optimizer.lr=fast", "seed=1.5", "seed=null", "name=null", "output_root=null",
                           "model.num_layers=[1]", "schedule.every={a:1}",
                           "optimizer.lr=${model}", "name=${nothing}", "tag=???", "optimizer.lr=1" + "0" * 400)),
        ("seed", "key=value"), ("model.num_layers=[1", "key=value"), ("seed=1,2", "--multirun"),
        # ranges
        ("optimizer.lr=0", "above 0"), ("optimizer.lr=-1", "above 0"), ("optimizer.lr=nan", "finite"),
        ("optimizer.lr=inf", "finite"), ("trainer.batch_size=1", "at least 2"), ("model.dropout=1", "below 1"),
        ("seed=-1", "at least 0"), ("seed=99999999999", "at most 4,294,967,295"),
        ("device=gpu", "auto, cpu, cuda, mps"), ("trainer.target_accuracy=99", "at most 1"),
        ("model.num_layers=10000000000000000000000", "at most 2,147,483,647"),
        *((f"model=indrnn_dense model.block_layers={blocks}", words)
          for blocks, words in (("[8,0]", "at least 1"), ("[]", "empty"), ("[8,a]", "'a'"))),
        # values that do not fit together
        ("model.last_layer_fixed=1.1", "1.00088"),
        ("schedule=plateau schedule.minimum_lr=1", "must be below optimizer.lr"),
        ("data=adding trainer.label_smoothing=0.1", "no classes"), ("data.permutation=nonsense", "seed92916"),
        ("tag=a/b", "tag"), ("name=..", "name"),
    ],
)  # fmt: skip
def test_bad_request_is_one_line(overrides, words):
    assert words in refusal(*overrides.split())


def test_values_at_the_limits_are_accepted():
    load("data=adding", "data.length=10", "model.last_layer_fixed=1.07")
    load("model.last_layer_fixed=1.1", "model.constraint=none")
    load("+optimizer.args.amsgrad=true", "optimizer.args.betas=[0.8,0.9]", "++seed=3")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# @package _global_\ntrainer:\n  max_step: 5\n", "did you mean trainer.max_steps"),
        ("# @package _global_\ntrainr:\n  max_steps: 5\n", "did you mean trainer"),
        ("# @package _global_\ntrainer:\n  max_steps: soon\n", "soon"),
        ("# @package _global_\ntrainer:\n  max_steps: [5\n", "line 4"),
        ("trainer:\n  max_steps: 5\n", "experiment"),
        ("# @package _global_\ndefaults:\n  - override /model: lstn\n", "lstm_chrono"),
        ("# @package _global_\ntrainer:\n  max_steps: -5\n", "trainer.max_steps=-5"),
    ],
)
def test_mistake_in_a_file_is_one_line(tmp_path, text, words):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert words in refusal("experiment=mine", config_dir=str(tmp_path))


def test_check_refuses_later_changes():
    cfg = load_config()
    cfg.optimizer.lr = -1.0
    with pytest.raises(UserError, match=r"optimizer\.lr=-1"):
        check(cfg)
    with pytest.raises(UserError, match="schema"):
        check(OmegaConf.create({"seed": 1}))


def test_result_keys_are_those_that_can_change_the_result():
    before = result_keys(load_config())
    assert before == result_keys(load("data.root=x", "trainer.log_every=7", "output_root=y", "overwrite=true"))
    assert before != result_keys(load("seed=1"))
    assert before["model.num_layers"] == 6
