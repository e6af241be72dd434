"""Every setting of a model and of a run, as frozen dataclasses that check themselves.

A config file (`configs/*.py`) returns `to_config_dict(TrainConfig(...))`, so that absl flags can
override any field (`--config.model.window=128`); `from_config_dict` turns the result back into
dataclasses. Each dataclass checks its own fields when it is made and `TrainConfig` those that
concern several, so nothing is compiled or written with a bad setting. The default of a field
stands here and nowhere else.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

MIXERS = ("mamba", "swa", "attention", "bmojo_f", "bmojo")


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One residual block of a pattern: a mixer, and whether an MLP block follows it."""

    mixer: str
    mlp: bool


def _require(valid: bool, field: str, value: object, wanted: str) -> None:
    if not valid:
        raise ValueError(f"{field}={value!r}: must be {wanted}")


def _check_literals(prefix: str, config: Any) -> None:
    for field in dataclasses.fields(config):
        _check_literal(f"{prefix}{field.name}", field.type, getattr(config, field.name))


def _check_literal(name: str, annotation: Any, value: Any) -> None:
    """Checks a field annotated as a Literal against its choices."""
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        _require(value in choices, name, value, f"one of {choices}")


def _check_at_least(prefix: str, config: Any, minimum: float | int, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(config, name)
        _require(
            isinstance(value, int | float) and math.isfinite(value) and value >= minimum,
            f"{prefix}{name}",
            value,
            f"a number >= {minimum}",
        )


def parse_pattern(pattern: str) -> tuple[BlockSpec, ...]:
    """Parses a comma-separated pattern, e.g. "mamba, swa+mlp", into its blocks.

    Raises:
      ValueError: the pattern is empty or names an unknown mixer.
    """
    blocks = []
    for item in pattern.split(","):
        mixer, plus, rest = item.strip().partition("+")
        if mixer not in MIXERS or (plus and rest != "mlp"):
            near = difflib.get_close_matches(mixer, MIXERS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near and near[0] != mixer else ""
            raise ValueError(
                f"model.pattern={pattern!r}: {item.strip()!r} must be one of {MIXERS}, "
                f'each with or without "+mlp"{hint}'
            )
        blocks.append(BlockSpec(mixer=mixer, mlp=bool(plus)))
    return tuple(blocks)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model of the family: widths, the pattern of its layers, and the options of a layer.

    The letters in the comments are those of the dimension key in `bmojo_jax/__init__.py`.
    """

    vocab_size: int = 257  # V
    width: int = 256  # D
    depth: int = 4  # mixers in total: a multiple of the pattern's length
    pattern: str = "bmojo"  # repeated over depth; comma-separated mixers, each may have "+mlp"

    num_heads: int = 4  # H
    num_kv_heads: int = 4  # G; H / G query heads share a key and value head
    head_width: int = 64  # K
    window: int = 128  # W: in-context keys, the query's own token included
    fading_window: int | None = None  # F: fading keys behind the window; None: as many as W
    eidetic_tokens: int = 64  # M
    chunk: int = 128  # C: queries that share one eidetic memory
    rope_theta: float = 10_000.0
    qk_norm: bool = True  # RMS norm per head of q and k, before rotary

    fading_projections: Literal["tied", "untied"] = "tied"  # Wk', Wv' of spec section 2.2
    fading_norm: bool = True  # RMS norm of f before Wk' and Wv'
    ssm_residual: bool = True  # adds f to a B'MOJO layer's output
    # Rotary position of eidetic keys: "slot", right behind the fading window; "original", the
    # token's own; "none", not rotated, which is the position of the document's first token.
    eidetic_positions: Literal["slot", "original", "none"] = "slot"
    innovation_of: Literal["fading", "input"] = "fading"  # the signal s of the innovation test
    eidetic_gate: bool = False  # a learned weight of log-innovation in the logit, per head

    ssm_expand: int = 2  # E = ssm_expand * D
    ssm_state: int = 16  # N
    conv_taps: int = 4  # T
    ssm_norm: bool = True  # RMS norm of y * SiLU(z) before the out-projection

    mlp_width: int = 1024  # hidden width of SwiGLU, where the pattern has "+mlp"
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # float64: for checks
    remat: Literal["none", "dots", "full"] = "none"
    # None: the fastest that the platform has; else a name that pallas_kernels knows.
    scan_implementation: str | None = None
    attention_implementation: str | None = None

    def __post_init__(self) -> None:
        _check_literals("model.", self)
        _check_at_least(
            "model.",
            self,
            1,
            (
                "vocab_size width depth num_heads num_kv_heads head_width window chunk "
                "ssm_expand ssm_state conv_taps mlp_width"
            ).split(),
        )
        _check_at_least("model.", self, 0, ("eidetic_tokens",))
        if self.fading_window is not None:
            _check_at_least("model.", self, 0, ("fading_window",))
        _require(
            1 < self.rope_theta < math.inf, "model.rope_theta", self.rope_theta, "> 1 and finite"
        )
        _require(0 < self.norm_eps < math.inf, "model.norm_eps", self.norm_eps, "> 0 and finite")
        length = len(self.blocks)
        _require(
            self.depth % length == 0,
            "model.depth",
            self.depth,
            f"a multiple of the pattern's {length} blocks ({self.pattern!r})",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of model.num_heads={self.num_heads}",
        )
        _require(
            self.head_width % 2 == 0, "model.head_width", self.head_width, "even (rotary pairs)"
        )

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The blocks of one group; the model repeats the group `num_groups` times."""
        return parse_pattern(self.pattern)

    @property
    def num_groups(self) -> int:
        return self.depth // len(self.blocks)

    @property
    def fading_span(self) -> int:
        """F: the fading keys that a query sees."""
        return self.window if self.fading_window is None else self.fading_window

    @property
    def ssm_inner(self) -> int:
        """E."""
        return self.ssm_expand * self.width

    @property
    def dt_rank(self) -> int:
        """R = ceil(D / 16)."""
        return math.ceil(self.width / 16)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with global-norm clipping and a schedule. Steps are optimizer updates."""

    learning_rate: float = 1e-3  # the peak
    schedule: Literal["warmup_cosine", "warmup_stable_decay"] = "warmup_cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # warmup_stable_decay: share of all steps spent decaying
    final_fraction: float = 0.1  # the last rate, as a share of the peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # of the global gradient norm
    accumulate: int = 1  # micro-batches that one update averages over

    def __post_init__(self) -> None:
        _check_literals("optim.", self)
        for name in ("learning_rate", "clip_norm", "eps"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"optim.{name}", value, "> 0 and finite")
        _check_at_least("optim.", self, 0, ("warmup_steps", "weight_decay"))
        _check_at_least("optim.", self, 1, ("accumulate",))
        for name in ("decay_fraction", "final_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"optim.{name}", value, "in [0, 1]")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.{name}", value, "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Documents and how they become rows of tokens."""

    source: Literal["text_folder"] = "text_folder"
    path: str = ""  # the folder
    include: str = ""  # glob below path, e.g. "**/*.txt"; empty: every file without NUL bytes
    exclude: tuple[str, ...] = ()  # names of folders, anywhere below path, to leave out
    validation_fraction: float = 0.05  # whole files, by a hash of their relative path
    tokenizer: Literal["bytes"] = "bytes"
    sequence_length: int = 1024  # L
    batch_size: int = 8  # rows of a step, over all devices and micro-batches
    # "anywhere": documents follow one another; "chunk": each starts at a multiple of
    # model.chunk, which makes its result independent of what is packed beside it.
    document_start: Literal["anywhere", "chunk"] = "anywhere"
    # Rows from which the next one is drawn, so that a long document does not fill whole batches;
    # they are held in memory. 1: rows keep the order of their documents.
    shuffle_window: int = 1024
    seed: int = 0
    workers: int = 0  # reader processes; 0 reads in threads of this process

    def __post_init__(self) -> None:
        _check_literals("data.", self)
        _check_at_least("data.", self, 1, ("sequence_length", "batch_size", "shuffle_window"))
        _check_at_least("data.", self, 0, ("workers", "seed"))
        _require(
            0 < self.validation_fraction < 1,
            "data.validation_fraction",
            self.validation_fraction,
            "in (0, 1)",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1: whatever is left."""

    data: int = -1  # batch, parameters replicated
    fsdp: int = 1  # batch, parameters cut
    tensor: int = 1  # heads, SSM channels, MLP hidden units, vocabulary

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(
                isinstance(size, int) and (size == -1 or size >= 1),
                f"mesh.{name}",
                size,
                "-1 or a positive integer",
            )
        free = [name for name, size in sizes.items() if size == -1]
        _require(len(free) <= 1, f"mesh.{'/'.join(free)}", -1, "-1 for one axis at most")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run: everything that `train.py` needs beside the work directory."""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()

    steps: int = 1000  # optimizer updates
    seed: int = 0  # of the parameters
    z_loss: float = 0.0  # weight of mean log^2 of the softmax normaliser
    vocab_chunk: int = 8192  # logits are held for this many words at a time
    non_finite: Literal["stop", "skip"] = "stop"  # what a non-finite loss or gradient does

    log_every: int = 10
    eval_every: int = 200
    eval_batches: int = 16  # 0: the whole validation split
    checkpoint_every: int = 200
    keep_last: int = 2
    keep_best: int = 1
    sample_prompt: str = ""  # after training, a continuation of this is printed
    sample_tokens: int = 0  # how many tokens; 0: no sample
    # What the last line sets the validation loss beside; needs the whole split, eval_batches=0.
    compare_with: Literal["nothing", "zlib_and_bigram"] = "nothing"

    def __post_init__(self) -> None:
        _check_literals("", self)
        _check_at_least(
            "",
            self,
            1,
            "steps vocab_chunk log_every eval_every checkpoint_every keep_last".split(),
        )
        _check_at_least(
            "", self, 0, ("seed", "z_loss", "eval_batches", "keep_best", "sample_tokens")
        )
        _require(
            self.data.batch_size % self.optim.accumulate == 0,
            "data.batch_size",
            self.data.batch_size,
            f"a multiple of optim.accumulate={self.optim.accumulate}",
        )
        _require(
            self.compare_with == "nothing" or self.eval_batches == 0,
            "eval_batches",
            self.eval_batches,
            f"0, the whole split, with compare_with={self.compare_with!r}",
        )
        _require(
            self.optim.warmup_steps <= self.steps,
            "optim.warmup_steps",
            self.optim.warmup_steps,
            f"at most steps={self.steps}",
        )


def _plain_type(annotation: Any) -> Any:
    """The type behind an annotation such as `int | None`, `Literal["a", "b"]` or `str`."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return str
    if origin in (types.UnionType, typing.Union):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return origin or annotation


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A ConfigDict of a dataclass: what a config file returns and flags override."""
    result = ml_collections.ConfigDict()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            result[field.name] = to_config_dict(value)
        elif value is None:
            result[field.name] = config_dict.placeholder(_plain_type(field.type))
        else:
            result[field.name] = value
    return result.lock()


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a dataclass, ready for JSON."""
    return dataclasses.asdict(config)


def setting_names(kind: Any = None, section: str = "") -> list[str]:
    """The names of all settings, e.g. "model.window"."""
    names = []
    for field in dataclasses.fields(kind or TrainConfig):
        if dataclasses.is_dataclass(field.type):
            names += setting_names(field.type, f"{section}{field.name}.")
        else:
            names.append(section + field.name)
    return names


def check_name(name: str) -> None:
    """Raises ValueError if `name` is not a setting; suggests the nearest."""
    if name not in setting_names():
        raise ValueError(_unknown(name))


def _unknown(name: str) -> str:
    def similarity(known: str) -> float:
        # Twice the last part, so that a setting is also found under the wrong section.
        whole = difflib.SequenceMatcher(None, name, known)
        last = difflib.SequenceMatcher(None, name.split(".")[-1], known.split(".")[-1])
        return whole.ratio() + last.ratio()

    return f"{name} is not a setting; did you mean {max(setting_names(), key=similarity)}?"


def from_dict[T](kind: type[T], values: Mapping[str, Any], section: str = "") -> T:
    """Makes the dataclass `kind` of nested plain values, checking every name, type and value.

    `section` prefixes the names in errors, e.g. "model.".

    Raises:
      ValueError: a field is unknown (the nearest known one is suggested), of the wrong type, or
        has a bad value.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyrefly: ignore
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(_unknown(section + name))
        annotation = fields[name].type
        if dataclasses.is_dataclass(annotation):
            arguments[name] = from_dict(annotation, value, f"{section}{name}.")  # pyrefly: ignore
        else:
            arguments[name] = _convert(annotation, value, f"{section}{name}")
    return kind(**arguments)


def _convert(annotation: Any, value: Any, name: str) -> Any:
    optional = type(None) in typing.get_args(annotation)
    plain = _plain_type(annotation)
    if value is None and optional:
        return None
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain is tuple and isinstance(value, list):
        value = tuple(value)
    right = isinstance(value, plain) and not (plain is int and isinstance(value, bool))
    _require(right, name, value, f"of type {plain.__name__}" + (" or None" if optional else ""))
    _check_literal(name, annotation, value)
    return value


def from_config_dict(config: ml_collections.ConfigDict) -> TrainConfig:
    """The checked TrainConfig of a (possibly overridden) ConfigDict."""
    return from_dict(TrainConfig, config.to_dict())
