"""The schema of the configuration: every key with its type, range and meaning.

Types and ranges are declared only here, values only in ``configs/*.yaml``: one file per choice, which begins with
``defaults: [/schema/<group>/<name>@_here_]``.

A key with ``affects_result=False`` cannot change what a run computes (where data is stored, what is logged): two runs
that differ only in such keys are the same run.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any

from omegaconf import MISSING


def setting(doc: str, **limits: Any) -> Any:
    """Declare one key; ``doc`` is for ``--help``.

    The bounds ``minimum`` and ``maximum`` are allowed values, ``above`` and ``below`` are not. All limits apply to each
    element of a list, and not to None. ``text=str`` goes with the type Any and refuses anything else: OmegaConf would
    convert the number ``tag: 007`` in a file to a str.
    """
    return field(default=MISSING, metadata={"doc": doc, **limits})


# Names that are safe as folders on every file system; TensorBoard's list of runs shows "=" and "+", too.
FOLDER_NAME = r"[\w=+,@%-][\w.=+,@%-]*"
FOLDER_NAME_RULE = "use letters, digits, _ - + = , @ % and dots (not first)"
NONLINEARITIES = ("relu", "tanh", "identity", "leaky_relu")
BACKENDS = ("auto", "reference", "scan", "numba", "triton")
INPUT_WEIGHTS = ("small_uniform", "small_normal", "kaiming")
# The largest seed that every generator accepts; numpy's RandomState has the lowest limit.
MAX_SEED = 2**32 - 1


@dataclass
class ModelConfig:
    name: str = setting("an entry of indrnn.models.MODELS, or the name of a custom model")


@dataclass
class ExternalModelConfig(ModelConfig):
    _target_: str = setting("module.Class of a custom model, called as Class(task, **args)")
    args: dict[str, Any] = field(default_factory=dict, metadata={"doc": "arguments of the custom model"})


@dataclass
class RecurrentConfig(ModelConfig):
    hidden_size: int = setting("units per layer (IndRNN dense: of the stem)", minimum=1)


@dataclass
class IndRNNBaseConfig(RecurrentConfig):
    nonlinearity: str = setting("of the recurrence", choices=NONLINEARITIES)
    gamma: float = setting("RECURRENT_MAX = gamma^(1/T): growth of a state over the sequence", minimum=1.0)
    constraint: str = setting("of |u|: clip in the forward pass, or project", choices=("clip", "project", "none"))
    norm: str = setting("batch norm over batch and time after each recurrence, or none", choices=("batch", "none"))
    dropout: float = setting("probability; one mask per sequence for all time steps", minimum=0.0, below=1.0)
    weight_init: str = setting("U(-0.001, 0.001), N(0, 0.001), or Kaiming uniform, a=8", choices=INPUT_WEIGHTS)
    recurrent_init: str = setting("lower layers' u: from 0 or -RECURRENT_MAX", choices=("positive", "symmetric"))
    last_layer_min: bool = setting("u of the last layer from [LAST_LAYER_LOWER_BOUND, RECURRENT_MAX]")
    last_layer_fixed: float | None = setting("initialize every u of the last layer to this value instead")
    backend: str = setting("implementation of the recurrence", choices=BACKENDS)


@dataclass
class IndRNNConfig(IndRNNBaseConfig):
    num_layers: int = setting("stacked layers", minimum=1)


@dataclass
class IndRNNResidualConfig(IndRNNBaseConfig):
    num_blocks: int = setting("pre-activation blocks of two recurrences", minimum=1)


@dataclass
class IndRNNDenseConfig(IndRNNBaseConfig):
    block_layers: list[int] = setting("dense layers in each block", minimum=1)
    growth: int = setting("features that each dense layer adds", minimum=1)
    bottleneck: int = setting("width of a dense layer's first recurrence / growth", minimum=1)
    dropout_features: float = setting("after the stem and each dense layer's output", minimum=0.0, below=1.0)


@dataclass
class GRUConfig(RecurrentConfig):
    num_layers: int = setting("stacked layers", minimum=1)


@dataclass
class LSTMConfig(GRUConfig):
    weight_init: str = setting("Glorot and orthogonal, or nn.LSTM's own", choices=("glorot", "pytorch"))
    bias_init: str = setting("forget_bias, or the forget gates log U[1, T - 1]", choices=("forget", "chrono"))
    forget_bias: float = setting("initial bias of the forget gate, in total, for bias_init=forget")
    dropout: float = setting("between layers and before the classifier", minimum=0.0, below=1.0)


@dataclass
class RNNConfig(GRUConfig):
    nonlinearity: str = setting("of torch.nn.RNN", choices=("relu", "tanh"))


@dataclass
class DataConfig:
    name: str = setting("the task, or the name of a custom task")


@dataclass
class ExternalDataConfig(DataConfig):
    _target_: str = setting("module.function of a custom task, called as function(**args); returns indrnn.data.Task")
    args: dict[str, Any] = field(default_factory=dict, metadata={"doc": "arguments of the custom task"})


@dataclass
class MNISTConfig(DataConfig):
    root: Any = setting("folder that holds or receives the MNIST files", text=str, affects_result=False)
    mirror: Any = setting("folder or URL to try first for the files", text=str | None, affects_result=False)
    validation_size: int = setting("images held out of the 60,000, stratified", minimum=10, maximum=59_000)
    split_seed: int = setting("of the train/validation split", minimum=0, maximum=MAX_SEED)
    permutation: str | None = setting("seed92916, bitrev, torch12008, torch5544, numpy0, random:<seed> or null")


@dataclass
class MNIST5kConfig(DataConfig):
    validation_size: int = setting("images, stratified", minimum=10, maximum=4000)
    test_size: int = setting("images, stratified", minimum=10, maximum=4000)
    split_seed: int = setting("of the train/validation/test split", minimum=0, maximum=MAX_SEED)
    permutation: str | None = setting("as for mnist")


@dataclass
class AddingConfig(DataConfig):
    length: int = setting("time steps", minimum=2, maximum=1_000_000)
    validation_size: int = setting("sequences", minimum=1)
    test_size: int = setting("sequences", minimum=1)
    data_seed: int = setting("of the generated numbers", minimum=0, maximum=MAX_SEED)


@dataclass
class OptimizerConfig:
    name: str = setting("the optimizer, for the record")
    _target_: str = setting("module.Class of a torch.optim.Optimizer, called as Class(groups, lr=lr, **args)")
    lr: float = setting("learning rate at the start (at the peak for cosine and one_cycle)", above=0.0)
    weight_decay: float = setting("of matrices and norm scales, not of u and biases", minimum=0.0)
    args: dict[str, Any] = field(default_factory=dict, metadata={"doc": "further arguments of the optimizer"})


@dataclass
class MuonConfig(OptimizerConfig):
    muon_lr: float = setting("Muon's learning rate, at the start or the peak as lr", above=0.0)
    momentum: float = setting("of Muon", minimum=0.0, below=1.0)


@dataclass
class ScheduleConfig:
    name: str = setting("the learning rate's course")


@dataclass
class StaircaseConfig(ScheduleConfig):
    every: int = setting("steps between drops", minimum=1)
    factor: float = setting("multiplies the rate at each drop", above=0.0, below=1.0)


@dataclass
class PlateauConfig(ScheduleConfig):
    factor: float = setting("multiplies the rate at each drop", above=0.0, below=1.0)
    patience: list[int] = setting("evaluations without improvement before each drop; the last repeats", minimum=1)
    minimum_lr: float = setting("the run ends when the rate falls below it", above=0.0)
    restore_best: bool = setting("at a drop, restore the best weights and their optimizer state")


@dataclass
class CosineConfig(ScheduleConfig):
    warmup: float = setting("share of the steps with a rising rate", minimum=0.0, below=1.0)
    final: float = setting("rate at the end, as a share of the peak", minimum=0.0, maximum=1.0)


@dataclass
class OneCycleConfig(ScheduleConfig):
    warmup: float = setting("share of the steps with a rising rate", above=0.0, below=1.0)
    initial: float = setting("rate at the start, as a share of the peak", above=0.0, maximum=1.0)
    final: float = setting("rate at the end, as a share of the peak", minimum=0.0, maximum=1.0)


@dataclass
class CustomScheduleConfig(ScheduleConfig):
    """A class is called as Class(optimizer, **args), a function as function(**args), which returns share(step)."""

    _target_: str = setting("module.Name of a torch.optim.lr_scheduler class or a function")
    args: dict[str, Any] = field(default_factory=dict, metadata={"doc": "its arguments"})


@dataclass
class TrainerConfig:
    batch_size: int = setting("sequences per step", minimum=2)
    max_steps: int = setting("maximum number of steps", minimum=1)
    eval_every: int = setting("steps between evaluations on the validation set", minimum=1)
    log_every: int = setting("steps between log rows", minimum=1, affects_result=False)
    checkpoint_every: int = setting("steps between checkpoints", minimum=1, affects_result=False)
    eval_batch_size: int = setting("sequences per forward pass of an evaluation", minimum=1)
    bn_samples: int | None = setting(
        "training samples (at most all) for batch-norm statistics of an evaluation; null: running averages", minimum=2
    )
    clip_norm: float | None = setting("maximum global gradient norm; null: no limit", above=0.0)
    clip_value: float | None = setting("maximum absolute gradient value; null: no limit", above=0.0)
    label_smoothing: float = setting("of the training loss; 0: none", minimum=0.0, below=1.0)
    target_accuracy: float | None = setting("stop above this validation accuracy; or null", minimum=0.0, maximum=1.0)
    target_loss: float | None = setting("stop once the best evaluation has a loss below this; or null", minimum=0.0)
    precision: str = setting("of the products", choices=("float32", "tf32", "bfloat16"))
    cuda_graph: Any = setting("auto: if capture works", choices=("auto", True, False), affects_result=False)


@dataclass
class Config:
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    schedule: ScheduleConfig = MISSING
    trainer: TrainerConfig = MISSING
    name: Any = setting("of the run folder; default: experiment and model", text=str)
    tag: Any = setting("appended to the name, to keep variants apart", text=str | None)
    seed: int = setting("of initialization, data order and dropout", minimum=0, maximum=MAX_SEED)
    device: str = setting("auto: a CUDA GPU if there is one", choices=("auto", "cpu", "cuda", "mps"))
    output_root: Any = setting("run folders are created below it", text=str, affects_result=False)
    overwrite: bool = setting("delete the run folder's content and start again", affects_result=False)


# group -> choice -> class; a YAML file of configs/<group>/ refers to one of these as /schema/<group>/<choice>.
SCHEMAS: dict[str, dict[str, type]] = {
    "model": {
        "indrnn": IndRNNConfig,
        "indrnn_residual": IndRNNResidualConfig,
        "indrnn_dense": IndRNNDenseConfig,
        "lstm": LSTMConfig,
        "rnn": RNNConfig,
        "gru": GRUConfig,
        "mingru": GRUConfig,
        "external": ExternalModelConfig,
    },
    "data": {"mnist": MNISTConfig, "mnist5k": MNIST5kConfig, "adding": AddingConfig, "external": ExternalDataConfig},
    "optimizer": {"base": OptimizerConfig, "muon": MuonConfig},
    "schedule": {
        "constant": ScheduleConfig,
        "staircase": StaircaseConfig,
        "plateau": PlateauConfig,
        "cosine": CosineConfig,
        "one_cycle": OneCycleConfig,
        "custom": CustomScheduleConfig,
    },
    "trainer": {"base": TrainerConfig},
}


def all_keys() -> Iterator[tuple[str, Field[Any]]]:
    """Iterate over every key that a configuration can have, the groups included: dotted key, field."""
    yield from ((key.name, key) for key in fields(Config))
    for group, choices in SCHEMAS.items():
        for schema in choices.values():
            yield from ((f"{group}.{key.name}", key) for key in fields(schema))
