"""Composing and checking: what a user asks for is what runs, and a mistake is one line that says how to mend it."""

from pathlib import Path

import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from indrnn.config.checks import check, result_keys
from indrnn.config.compose import Composer, config_dir, load_config
from indrnn.config.schema import SCHEMAS, Config
from indrnn.errors import UserError

COMPOSER = Composer()
CHOICES = {f"{group}={name}" for group, names in COMPOSER.choices().items() for name in names}


def load(*overrides: str) -> Config:
    """As load_config, which reads every file again each time."""
    cfg = COMPOSER.compose(overrides)
    check(cfg)
    return cfg


def refusal(*overrides: str, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(list(overrides), **options) if options else load(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What runs


def test_the_default_is_the_tutorial_protocol():
    cfg = load_config()
    assert (cfg.model.name, cfg.model.num_layers, cfg.model.hidden_size) == ("indrnn", 6, 128)
    assert (cfg.model.gamma, cfg.model.constraint, cfg.model.norm, cfg.model.dropout) == (2.0, "clip", "batch", 0.0)
    assert (cfg.optimizer.name, cfg.optimizer.lr, cfg.optimizer.weight_decay) == ("adam", 2e-4, 0.0)
    assert (cfg.schedule.name, cfg.schedule.every, cfg.schedule.factor) == ("staircase", 600_000, 0.1)
    trainer = cfg.trainer
    assert (trainer.batch_size, trainer.max_steps, trainer.eval_every) == (32, 60_000, 1000)
    assert (trainer.clip_norm, trainer.clip_value, trainer.target_accuracy) == (5.0, None, 0.99)
    assert (cfg.data.name, cfg.data.validation_size) == ("mnist", 5000)


def test_the_paper_protocol_differs_from_the_tutorials_where_the_papers_code_does():
    tutorial, paper = result_keys(load_config()), result_keys(load("experiment=paper"))
    assert {key: value for key, value in paper.items() if tutorial.get(key) != value} == {
        "model.gamma": 5.0,
        "model.constraint": "project",
        "model.dropout": 0.1,
        "model.weight_init": "kaiming",
        "data.validation_size": 3000,
        "optimizer.weight_decay": 1e-4,
        "schedule.name": "plateau",
        "schedule.patience": [100, 50, 25],
        "schedule.minimum_lr": 1e-6,
        "schedule.restore_best": True,
        "trainer.max_steps": 2_000_000,
        "trainer.eval_every": 1700,
        "trainer.clip_norm": None,
        "trainer.clip_value": 10.0,
        "trainer.target_accuracy": None,
        "name": "paper_indrnn",
    }


@pytest.mark.parametrize("choice", sorted(CHOICES))
def test_every_choice_composes_and_passes_the_checks(choice):
    group, _, name = choice.partition("=")
    cfg = load(choice, *["optimizer._target_=torch.optim.Adam"] * (choice == "optimizer=custom"))
    assert group in ("experiment", "model", "trainer") or cfg[group].name == name


@pytest.mark.parametrize("model", COMPOSER.choices()["model"])
@pytest.mark.parametrize("experiment", COMPOSER.choices()["experiment"])
def test_every_protocol_runs_every_network_under_a_name_of_its_own(experiment, model):
    cfg = load(f"experiment={experiment}", f"model={model}")
    assert cfg.name == f"{experiment}_{model}"
    reference = load(f"experiment={experiment}")
    alike = ("data", "optimizer", "schedule", "trainer")
    if experiment in ("fast", "long"):  # its rate is tuned for each network
        alike = ("data", "trainer")
    for group in alike:
        assert getattr(cfg, group) == getattr(reference, group)


def test_what_the_paper_sets_for_one_network_is_set_for_its_variants():
    networks = [load("experiment=paper", f"model=indrnn{suffix}").model for suffix in ("", "_12layer", "_residual")]
    assert {(model.gamma, model.constraint, model.dropout, model.weight_init) for model in networks} == {
        (5.0, "project", 0.1, "kaiming")
    }
    assert networks[1].num_layers == 12


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml")))
def test_an_experiment_file_says_how_to_run_it_and_what_to_expect(experiment):
    text = (config_dir() / "experiment" / f"{experiment}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    command = next(line for line in text.splitlines() if line.startswith("# command:"))
    assert f"experiment={experiment}" in command
    for word in ("expect", "hardware", "time"):
        assert f"\n# {word}:" in text


def test_the_files_give_every_key_of_the_schema_a_value_of_its_own():
    """A key that only the dataclass knows would be missing where people look for what there is to set."""
    for group, schemas in SCHEMAS.items():
        for choice, schema in schemas.items():
            if choice == "external":
                continue  # Its files are the users' own.
            name = {"base": "adam" if group == "optimizer" else "default"}.get(choice, choice)
            content = yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text())
            content = content.get(group, content)
            assert set(schema.__dataclass_fields__) <= set(content), f"{group}/{name}.yaml"


def test_the_length_studys_indrnn_is_the_ports():
    model = load("experiment=length_study").model
    assert (model.num_layers, model.norm, model.last_layer_fixed) == (2, "none", 1.0)
    assert (model.weight_init, model.recurrent_init) == ("small_normal", "symmetric")


def test_mnist_is_looked_for_where_the_environment_says(monkeypatch):
    monkeypatch.delenv("INDRNN_DATA", raising=False)
    assert load_config().data.root == "data"
    monkeypatch.setenv("INDRNN_DATA", "/elsewhere")
    assert load_config().data.root == "/elsewhere"
    assert load("data.root=here").data.root == "here"


def test_a_folder_of_ones_own_adds_choices(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 7\n")
    assert load_config(["experiment=mine"], config_dir=str(tmp_path)).trainer.max_steps == 7


def test_a_run_is_named_after_the_files_that_were_chosen(tmp_path):
    for group, name, text in (
        ("model", "wide", "defaults: [lstm, _self_]\nhidden_size: 300\n"),
        ("experiment", "short", "# @package _global_\ndefaults: [paper, _self_]\ntrainer: {max_steps: 7}\n"),
        (".", "mine", "defaults: [train, _self_]\nseed: 7\n"),
    ):
        (tmp_path / group).mkdir(exist_ok=True)
        (tmp_path / group / f"{name}.yaml").write_text(text)
    for words, name in (
        ([], "indrnn"),
        (["model=lstm_matched"], "lstm_matched"),
        (["model=wide"], "wide"),
        (["experiment=short"], "short_indrnn"),
        (["experiment=demo", "model=wide"], "demo_wide"),
        (["model=wide", "name=mine"], "mine"),
    ):
        assert load_config(words, config_dir=str(tmp_path)).name == name
    assert load_config(["model=wide"], "mine", str(tmp_path)).name == "mine_wide"


def test_the_composed_configuration_is_plain_and_complete():
    cfg = load("model=lstm")
    values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert set(values) == {
        *SCHEMAS, "name", "tag", "seed", "device", "output_root", "resume", "overwrite"
    }  # fmt: skip


# What is refused


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_misspelt_key_is_refused_with_a_suggestion(prefix):
    assert "did you mean optimizer.lr" in refusal(f"{prefix}optimizer.lrr=1")


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [("lr=1", "optimizer.lr"), ("layers=3", "model.num_layers"), ("modl=lstm", "model"), ("sede=1", "seed"),
     ("train.max_steps=3", "trainer.max_steps"), ("~tagg", "tag")],
)  # fmt: skip
def test_a_suggestion_is_the_key_that_was_meant(override, suggestion):
    assert f"did you mean {suggestion}" in refusal(override)


def test_a_key_of_another_model_is_recognised_as_one():
    message = refusal("model=lstm", "model.gamma=3")
    assert "model=lstm" in message
    assert "belongs to model=indrnn" in message


def test_a_new_key_is_refused_even_with_a_plus():
    for group in SCHEMAS:
        assert f"{group}.brandnew" in refusal(f"+{group}.brandnew=1")
    assert "zzz" in refusal("++zzz=1")


@pytest.mark.parametrize(
    "override", ["~seed", "~optimizer.lr", "~model", "+model=lstm", "+optimizer.lr=1", "model=null"]
)
def test_what_must_be_there_once_cannot_be_taken_away_or_added(override):
    assert override.strip("~+").split("=")[0] in refusal(override)


def test_a_wrong_choice_lists_the_choices():
    message = refusal("model=lsmt")
    assert "did you mean lstm" in message
    assert "indrnn_dense" in message
    assert "length_study" in refusal("experiment=nothing_like_it")


@pytest.mark.parametrize(
    "override",
    ["optimizer.lr=fast", "optimizer.lr=true", "seed=1.5", "seed=null", "model.num_layers=[1]", "overwrite=7.5",
     "schedule.every={a: 1}"],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(override):
    assert refusal(override).startswith(override.split("=")[0])


@pytest.mark.parametrize(
    ("override", "limit"),
    [("optimizer.lr=0", "above 0"), ("optimizer.lr=-1", "above 0"), ("optimizer.lr=nan", "finite"),
     ("optimizer.lr=inf", "finite"), ("trainer.batch_size=1", "at least 2"), ("model.dropout=1", "below 1"),
     ("seed=-1", "at least 0"), ("seed=99999999999", "at most 4,294,967,295"), ("model.gamma=0.5", "at least 1"),
     ("device=gpu", "auto, cpu, cuda, mps"), ("model.norm=bach", "batch, none"),
     ("model.name=lstm", "model=lstm"),
     ("trainer.target_accuracy=99", "at most 1"), ("model.num_layers=10000000000000000000000", "at most 1,000"),
     ("trainer.max_steps=10000000000", "at most 2,147,483,647")],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_key_value_and_range(override, limit):
    message = refusal(override)
    assert message.startswith(override.split("=")[0])
    assert limit in message


def test_a_size_without_end_is_refused():
    assert "at most 1,000,000" in refusal("data=adding", "data.test_size=1000000000000")


def test_a_launcher_that_is_not_installed_says_how_to_get_it(monkeypatch):
    options = ConfigLoaderImpl.get_group_options
    monkeypatch.setattr(
        ConfigLoaderImpl,
        "get_group_options",
        lambda self, group, *_, **more: ["basic"] if group == "hydra/launcher" else options(self, group, *_, **more),
    )
    assert "pip install 'indrnn[sweep]'" in refusal("hydra/launcher=joblib")


def test_lists_are_checked_element_by_element():
    assert "at least 1" in refusal("model=indrnn_dense", "model.block_layers=[8,0]")
    assert "empty" in refusal("model=indrnn_dense", "model.block_layers=[]")
    assert "a is not a whole number" in refusal("model=indrnn_dense", "model.block_layers=[8,a]")


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["trainer.batch_size=55001"], "55,000"),
        (["trainer.bn_samples=55001"], "55,000"),
        (["data=mnist5k", "data.validation_size=4000"], "leave no image"),
        (["data=mnist5k", "trainer.batch_size=3501"], "3,500"),
        (["schedule=plateau", "schedule.minimum_lr=1e-3"], "optimizer.lr"),
        (["model.last_layer_fixed=1.1"], "1.00088"),
        (["data.permutation=nonsense"], "seed92916"),
        (["data=mnist_permuted", "data.permutation=null"], "data=mnist"),
        (["tag=a/b"], "folder"),
        (["name=.."], "folder"),
        (["output_root=''"], "output_root"),
    ],
)
def test_values_that_do_not_go_together_are_refused(overrides, word):
    assert word in refusal(*overrides)


def test_values_at_the_edge_go_together():
    load("trainer.batch_size=55000")
    load("data=adding", "data.length=10", "model.last_layer_fixed=1.07")
    load("model.last_layer_fixed=1.1", "model.constraint=none")


@pytest.mark.parametrize(
    "override", ["seed", "=3", "a b", "model.num_layers=[1", "seed=1,2", "name=${nothing}", "tag=???"]
)
def test_what_cannot_be_read_is_refused(override):
    refusal(override)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# @package _global_\ntrainer:\n  max_step: 5\n", "trainer.max_step: there is no such key; did you mean"),
        ("# @package _global_\ntrainr:\n  max_steps: 5\n", "did you mean trainer"),
        ("# @package _global_\ntrainer:\n  max_steps: soon\n", "soon is not a whole number"),
        ("# @package _global_\ntrainer:\n  max_steps: [5\n", "line 4"),
        ("trainer:\n  max_steps: 5\n", "# @package _global_"),
        ("# @package _global_\ndefaults:\n  - override /model: lstn\n", "model/lstn"),
        ("# @package _global_\ntrainer:\n  max_steps: -5\n", "trainer.max_steps=-5"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_names_the_file_or_the_key(tmp_path, text, words):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert words in refusal("experiment=mine", config_dir=str(tmp_path))


def test_a_missing_folder_or_primary_file_is_named(tmp_path):
    assert "nowhere" in refusal(config_dir="nowhere")
    assert "nothing" in refusal(config_name="nothing")


def test_check_alone_refuses_what_was_changed_later():
    cfg = load_config()
    cfg.optimizer.lr = -1.0
    with pytest.raises(UserError, match=r"optimizer\.lr=-1"):
        check(cfg)
    with pytest.raises(UserError, match="schema"):
        check(OmegaConf.create({"seed": 1}))


# Sweeps, keys that count, places


def test_a_sweep_is_expanded_in_hydras_order():
    jobs = Composer().jobs(["model=lstm,rnn", "seed=range(0,2)", "device=cpu"])
    assert jobs == [
        ["model=lstm", "seed=0", "device=cpu"],
        ["model=lstm", "seed=1", "device=cpu"],
        ["model=rnn", "seed=0", "device=cpu"],
        ["model=rnn", "seed=1", "device=cpu"],
    ]


def test_a_glob_sweeps_over_the_choices():
    assert ["model=lstm_matched"] in Composer().jobs(["model=glob(lstm*)"])


def test_keys_that_cannot_change_the_result_do_not_count():
    before = result_keys(load_config())
    assert before == result_keys(load("data.root=x", "trainer.log_every=7", "output_root=y", "overwrite=true"))
    assert before != result_keys(load("seed=1"))
    assert before["model.num_layers"] == 6


def test_a_checkouts_files_are_used_and_no_strangers(tmp_path):
    def package(folder: str) -> Path:
        path = tmp_path / folder / "indrnn"
        path.mkdir(parents=True)
        return path

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.yaml").touch()
    assert config_dir(package("src")) == tmp_path / "configs"
    with pytest.raises(UserError, match="install indrnn again"):
        config_dir(package("libraries"))
    installed = package("site-packages")
    (installed / "configs").mkdir()
    (installed / "configs" / "train.yaml").touch()
    assert config_dir(installed) == installed / "configs"
