"""The schema of the configuration: every key with its type, range and meaning.

Keys, types and ranges are declared only here, values only in ``configs/*.yaml``, one file per choice, which begins with
``defaults: [/schema/<group>/<name>@_here_]``. The field metadata has the ranges, for `indrnn.config.checks`.

A field with ``affects_result=False`` cannot change what a run computes (where data is stored, what is logged): two runs
that differ only there are the same run.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypedDict, Unpack

from omegaconf import MISSING


class Bounds(TypedDict, total=False):
    """``minimum`` and ``maximum`` are allowed values, ``above`` and ``below`` are not."""

    minimum: float
    maximum: float
    above: float
    below: float


def setting(
    doc: str = "",
    *,
    choices: tuple[str | bool, ...] | None = None,
    affects_result: bool = True,
    **bounds: Unpack[Bounds],
) -> Any:
    """Declare one key. Lists are checked element by element; ``None`` passes if the type is optional."""
    return field(default=MISSING, metadata={"doc": doc, "choices": choices, "affects_result": affects_result, **bounds})


# Names that are safe as folders on every file system; "=" and "+" are also shown in TensorBoard's list of runs.
FOLDER_NAME = r"[\w=+,@%-][\w.=+,@%-]*"
FOLDER_NAME_RULE = "use letters, digits and _ - + = , @ % and, but not first, a dot"
NONLINEARITIES = ("relu", "tanh", "identity", "leaky_relu")
# The largest seed that every generator accepts; numpy's RandomState has the lowest limit.
MAX_SEED = 2**32 - 1
# Far beyond any use; building a larger network would take for ever.
MAX_LAYERS, MAX_WIDTH = 1000, 100_000
# Sequences are generated for each evaluation; this many are enough for any precision.
MAX_SEQUENCES = 1_000_000
# The environment variables that limit the CPU threads of PyTorch and of our kernels, read when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
BACKENDS = ("auto", "reference", "scan", "numba", "triton")


@dataclass
class ModelConfig:
    name: str = setting(doc="an entry of indrnn.models.MODELS, or the name of a network from outside")


@dataclass
class ExternalModelConfig(ModelConfig):
    """A network from anywhere on Python's path."""

    _target_: str = setting(doc="module.Class, called as Class(task, **args) with the task's `indrnn.data.Task`")
    args: dict[str, Any] = field(default_factory=dict, metadata={"doc": "further arguments"})


@dataclass
class IndRNNBaseConfig(ModelConfig):
    """What every IndRNN network shares."""

    hidden_size: int = setting("recurrent units a layer", minimum=1, maximum=MAX_WIDTH)
    nonlinearity: str = setting("of the recurrence", choices=NONLINEARITIES)
    gamma: float = setting("RECURRENT_MAX = gamma^(1/T): how much a state may grow over the sequence", minimum=1.0)
    constraint: str = setting(
        "how |u| <= RECURRENT_MAX is kept: clip in the forward pass, project after each update, or not at all",
        choices=("clip", "project", "none"),
    )
    norm: str = setting("batch norm over batch and time after each recurrence, or none", choices=("batch", "none"))
    dropout: float = setting("probability; all time steps of a sequence share a mask", minimum=0.0, below=1.0)
    weight_init: str = setting(
        "input weights: U(-0.001, 0.001), N(0, 0.001), or Kaiming uniform with a=8",
        choices=("small_uniform", "small_normal", "kaiming"),
    )
    recurrent_init: str = setting(
        "u of the lower layers: U[0, RECURRENT_MAX] or U[-RECURRENT_MAX, RECURRENT_MAX]",
        choices=("positive", "symmetric"),
    )
    last_layer_min: bool = setting(
        "u of the last layer from [LAST_LAYER_LOWER_BOUND, RECURRENT_MAX]; false: drawn like the others"
    )
    last_layer_fixed: float | None = setting("start every u of the last layer at this value instead")
    backend: str = setting("implementation of the recurrence", choices=BACKENDS)


@dataclass
class IndRNNConfig(IndRNNBaseConfig):
    name: str = setting(choices=("indrnn",))
    num_layers: int = setting("IndRNN layers", minimum=1, maximum=MAX_LAYERS)


@dataclass
class IndRNNResidualConfig(IndRNNBaseConfig):
    name: str = setting(choices=("indrnn_residual",))
    num_blocks: int = setting(
        "pre-activation blocks of two recurrences; one more recurrence follows", minimum=1, maximum=MAX_LAYERS
    )


@dataclass
class IndRNNDenseConfig(IndRNNBaseConfig):
    name: str = setting(choices=("indrnn_dense",))
    hidden_size: int = setting("features of the stem, before the first block", minimum=1, maximum=MAX_WIDTH)
    block_layers: list[int] = setting("dense layers in each block", minimum=1, maximum=MAX_LAYERS)
    growth: int = setting("features each dense layer adds", minimum=1, maximum=MAX_WIDTH)
    bottleneck: int = setting(
        "width of a dense layer's first recurrence, in multiples of growth", minimum=1, maximum=MAX_LAYERS
    )
    dropout: float = setting(
        "after the bottleneck and the transitions; shared by all time steps", minimum=0.0, below=1.0
    )
    dropout_features: float = setting("after the stem and each dense layer's output", minimum=0.0, below=1.0)


@dataclass
class LSTMConfig(ModelConfig):
    name: str = setting(choices=("lstm",))
    hidden_size: int = setting("recurrent units a layer", minimum=1, maximum=MAX_WIDTH)
    num_layers: int = setting("LSTM layers", minimum=1, maximum=MAX_LAYERS)
    weight_init: str = setting(
        "glorot: Glorot uniform input weights and orthogonal recurrent ones; pytorch: U(-1/sqrt(H), 1/sqrt(H))",
        choices=("glorot", "pytorch"),
    )
    bias_init: str = setting(
        "forget: forget_bias on the forget gates; chrono: forget gates log U[1, T - 1], input gates the negative",
        choices=("forget", "chrono"),
    )
    forget_bias: float = setting("initial bias of the forget gate, in total, with bias_init=forget")
    dropout: float = setting("between layers and before the classifier", minimum=0.0, below=1.0)


@dataclass
class RNNConfig(ModelConfig):
    name: str = setting(choices=("rnn",))
    hidden_size: int = setting("recurrent units a layer", minimum=1, maximum=MAX_WIDTH)
    num_layers: int = setting("layers of torch.nn.RNN", minimum=1, maximum=MAX_LAYERS)
    nonlinearity: str = setting("of torch.nn.RNN", choices=("relu", "tanh"))


@dataclass
class DataConfig:
    name: str = setting(doc="the task, or the name of a task from outside")


@dataclass
class ExternalDataConfig(DataConfig):
    """A task from anywhere on Python's path."""

    _target_: str = setting(doc="module.function, called as function(**args), which returns an `indrnn.data.Task`")
    args: dict[str, Any] = field(default_factory=dict, metadata={"doc": "its arguments"})


@dataclass
class MNISTConfig(DataConfig):
    """Sequential MNIST: 784 pixels, one per time step."""

    name: str = setting(choices=("mnist", "mnist_permuted"))
    root: str = setting("folder that holds or receives the MNIST files", affects_result=False)
    mirror: str | None = setting("folder or URL to try first for the files", affects_result=False)
    validation_size: int = setting("images held out of the 60,000, stratified", minimum=10, maximum=59_000)
    split_seed: int = setting("of the train/validation split", minimum=0, maximum=MAX_SEED)
    permutation: str | None = setting(
        "order of the pixels: null, seed92916, bitrev, torch12008, torch5544, numpy0, random:<seed>, file:<path>"
    )


@dataclass
class MNIST5kConfig(DataConfig):
    """The bundled 5,000 images (500 a digit), for demos and tests."""

    name: str = setting(choices=("mnist5k",))
    validation_size: int = setting("images, stratified", minimum=10, maximum=4000)
    test_size: int = setting("images, stratified", minimum=10, maximum=4000)
    split_seed: int = setting("of the train/validation/test split", minimum=0, maximum=MAX_SEED)
    permutation: str | None = setting("as for mnist")


@dataclass
class AddingConfig(DataConfig):
    """The adding problem, generated on the fly."""

    name: str = setting(choices=("adding",))
    length: int = setting("time steps", minimum=2, maximum=1_000_000)
    validation_size: int = setting("sequences", minimum=1, maximum=MAX_SEQUENCES)
    test_size: int = setting("sequences", minimum=1, maximum=MAX_SEQUENCES)
    data_seed: int = setting("of the generated numbers", minimum=0, maximum=MAX_SEED)


@dataclass
class OptimizerConfig:
    name: str = setting("the optimizer, for the record")
    _target_: str = setting("a torch.optim.Optimizer, as module.Class, called as Class(groups, lr=lr, **args)")
    lr: float = setting("learning rate at the start (at the peak for cosine and one_cycle)", above=0.0)
    weight_decay: float = setting("on matrices and norm scales, not on u and biases", minimum=0.0)
    args: dict[str, Any] = field(default_factory=dict, metadata={"doc": "further arguments of the class"})


@dataclass
class MuonConfig(OptimizerConfig):
    """`torch.optim.Muon` for the hidden matrices, ``_target_`` for all other parameters."""

    muon_lr: float = setting("Muon's learning rate, at the start or the peak as lr", above=0.0)
    momentum: float = setting("of Muon", minimum=0.0, below=1.0)


@dataclass
class ScheduleConfig:
    name: str = setting(doc="how the learning rate changes")


@dataclass
class ConstantConfig(ScheduleConfig):
    name: str = setting(choices=("constant",))


@dataclass
class StaircaseConfig(ScheduleConfig):
    name: str = setting(choices=("staircase",))
    every: int = setting("steps between drops", minimum=1)
    factor: float = setting("multiplies the rate at each drop", above=0.0, below=1.0)


@dataclass
class PlateauConfig(ScheduleConfig):
    """The rate drops when `patience` evaluations bring no gain; the patience shrinks with each drop; the run ends
    when the rate falls below `minimum_lr`."""

    name: str = setting(choices=("plateau",))
    factor: float = setting(above=0.0, below=1.0)
    patience: list[int] = setting("evaluations without gain; the last repeats", minimum=1)
    minimum_lr: float = setting(above=0.0)
    restore_best: bool = setting("at a drop, go back to the best weights so far and the optimizer's state then")


@dataclass
class CosineConfig(ScheduleConfig):
    name: str = setting(choices=("cosine",))
    warmup: float = setting("share of the steps with a rising rate", minimum=0.0, below=1.0)
    final: float = setting("rate at the end, as a share of the peak", minimum=0.0, maximum=1.0)


@dataclass
class OneCycleConfig(ScheduleConfig):
    name: str = setting(choices=("one_cycle",))
    warmup: float = setting("share of the steps with a rising rate", above=0.0, below=1.0)
    initial: float = setting("rate at the start, as a share of the peak", above=0.0, maximum=1.0)
    final: float = setting("rate at the end, as a share of the peak", minimum=0.0, maximum=1.0)


@dataclass
class CustomScheduleConfig(ScheduleConfig):
    """A function of the step alone. A class is called as Class(optimizer, **args), where the optimizer has
    optimizer.lr; a function as function(**args), and returns share(step), the share of the peak rates."""

    _target_: str = setting("a torch.optim.lr_scheduler class or a function, as module.Name")
    args: dict[str, Any] = field(default_factory=dict, metadata={"doc": "its arguments"})


@dataclass
class TrainerConfig:
    batch_size: int = setting("sequences per step", minimum=2)
    max_steps: int = setting("the run ends here at the latest", minimum=1)
    eval_every: int = setting("steps between evaluations on the validation set", minimum=1)
    log_every: int = setting("steps between rows of training loss", minimum=1, affects_result=False)
    checkpoint_every: int = setting("steps between checkpoints", minimum=1, affects_result=False)
    eval_batch_size: int = setting("sequences per forward pass of an evaluation", minimum=1)
    bn_samples: int = setting(
        "training samples that batch-norm statistics are re-estimated from before each evaluation", minimum=2
    )
    clip_norm: float | None = setting("largest global gradient norm; null: no limit", above=0.0)
    clip_value: float | None = setting("largest gradient value; null: no limit", above=0.0)
    label_smoothing: float = setting("of the training loss; 0: none", minimum=0.0, below=1.0)
    target_accuracy: float | None = setting(
        "stop once validation accuracy exceeds it; null: never (a regression has none)", minimum=0.0, maximum=1.0
    )
    precision: str = setting(choices=("float32", "tf32", "bfloat16"))
    cuda_graph: Any = setting(
        "on one CUDA GPU, run forward and backward as one graph; auto: if they can be captured; true: or fail",
        choices=("auto", True, False),
        affects_result=False,
    )


@dataclass
class Config:
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    schedule: ScheduleConfig = MISSING
    trainer: TrainerConfig = MISSING
    name: str = setting("of the run folder: the experiment and the model, as far as the command chooses them")
    tag: str | None = setting("appended to the name, to keep variants apart")
    seed: int = setting("of initialisation, data order and dropout (separate streams)", minimum=0, maximum=MAX_SEED)
    device: str = setting("auto: a CUDA GPU if there is one", choices=("auto", "cpu", "cuda", "mps"))
    output_root: str = setting("run folders go below it", affects_result=False)
    resume: str = setting(
        "continue an unfinished run of the same config, or never", choices=("auto", "never"), affects_result=False
    )
    overwrite: bool = setting("delete what the run folder holds and start again", affects_result=False)


# group -> choice -> class; a YAML file of configs/<group>/ refers to one of these as /schema/<group>/<choice>.
SCHEMAS: dict[str, dict[str, type]] = {
    "model": {
        "indrnn": IndRNNConfig,
        "indrnn_residual": IndRNNResidualConfig,
        "indrnn_dense": IndRNNDenseConfig,
        "lstm": LSTMConfig,
        "rnn": RNNConfig,
        "external": ExternalModelConfig,
    },
    "data": {"mnist": MNISTConfig, "mnist5k": MNIST5kConfig, "adding": AddingConfig, "external": ExternalDataConfig},
    "optimizer": {"base": OptimizerConfig, "muon": MuonConfig},
    "schedule": {
        "constant": ConstantConfig,
        "staircase": StaircaseConfig,
        "plateau": PlateauConfig,
        "cosine": CosineConfig,
        "one_cycle": OneCycleConfig,
        "custom": CustomScheduleConfig,
    },
    "trainer": {"base": TrainerConfig},
}


def all_keys() -> Iterator[tuple[str, Field[Any]]]:
    """Every key that any configuration can have, dotted, with its field; the groups among them."""
    for key in fields(Config):
        yield key.name, key
    for group, choices in SCHEMAS.items():
        for schema in choices.values():
            yield from ((f"{group}.{key.name}", key) for key in fields(schema))
