"""Every setting of a model and of a run, as frozen dataclasses that check themselves.

A config file (`configs/*.py`) returns `settings.to_config_dict(TrainConfig(...))`, so that absl
flags can override any field (`--config.model.window=128`); `from_config_dict` turns the result back
into dataclasses. Each dataclass checks its own fields when it is made and `TrainConfig` those that
concern several, so nothing is compiled or written with a bad setting. The default of a field
stands here and nowhere else.
"""

import dataclasses
import difflib
import math
from typing import Literal

import ml_collections

from bmojo_jax import settings
from bmojo_jax.settings import check_at_least, check_literals, require

MIXERS = ("mamba", "swa", "attention", "bmojo_f", "bmojo")


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One residual block of a pattern: a mixer, and whether an MLP block follows it."""

    mixer: str
    mlp: bool


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
    # Which of the tokens that left the window are remembered: the M of largest innovation or, to
    # compare with (`memory.order`), some whatever they hold, the newest, or the document's first.
    eidetic_selection: Literal["innovation", "random", "newest", "oldest"] = "innovation"
    innovation_of: Literal["fading", "input"] = "fading"  # the signal s of the innovation test
    # What keys and values of a remembered token are made of: u, by Wk and Wv, or f, as the fading
    # stream's are.
    eidetic_content: Literal["input", "fading"] = "input"
    eidetic_gate: bool = False  # a learned weight of log-innovation in the logit, per head

    ssm_expand: int = 2  # E = ssm_expand * D
    ssm_state: int = 16  # N
    conv_taps: int = 4  # T
    ssm_norm: bool = True  # RMS norm of y * SiLU(z) before the out-projection

    mlp_width: int = 1024  # hidden width of SwiGLU, where the pattern has "+mlp"
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # float64: for checks
    # What a group's forward pass keeps for its backward pass: all; what products, attention and
    # scan gave ("kernels"); the same without the scan ("dots"); its input ("full"); not even that,
    # but the input of each of some sqrt(groups) stretches ("nested": one more forward pass). Which
    # tokens are remembered is always kept, attention across devices that share a row never.
    remat: Literal["none", "kernels", "dots", "full", "nested"] = "none"
    # None: the fastest that the platform has; else a name that pallas_kernels knows. "cudnn" is for
    # rows that are not told to hold several documents, which those of train.py are.
    scan_implementation: str | None = None
    attention_implementation: str | None = None

    def __post_init__(self) -> None:
        check_literals("model.", self)
        check_at_least(
            "model.",
            self,
            1,
            (
                "vocab_size width depth num_heads num_kv_heads head_width window chunk "
                "ssm_expand ssm_state conv_taps mlp_width"
            ).split(),
        )
        check_at_least("model.", self, 0, ("eidetic_tokens",))
        if self.fading_window is not None:
            check_at_least("model.", self, 0, ("fading_window",))
        require(
            1 < self.rope_theta < math.inf, "model.rope_theta", self.rope_theta, "> 1 and finite"
        )
        require(0 < self.norm_eps < math.inf, "model.norm_eps", self.norm_eps, "> 0 and finite")
        length = len(self.blocks)
        require(
            self.depth % length == 0,
            "model.depth",
            self.depth,
            f"a multiple of the pattern's {length} blocks ({self.pattern!r})",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of model.num_heads={self.num_heads}",
        )
        require(
            not self.eidetic_gate or self.eidetic_selection == "innovation",
            "model.eidetic_gate",
            self.eidetic_gate,
            f"False with model.eidetic_selection={self.eidetic_selection!r}: it weighs innovations",
        )
        require(
            self.head_width % 2 == 0, "model.head_width", self.head_width, "even (rotary pairs)"
        )

    @property
    def remembers(self) -> bool:
        """Whether some layer has an eidetic memory."""
        return bool(self.eidetic_tokens) and any(block.mixer == "bmojo" for block in self.blocks)

    def reads_fading(self, mixer: str) -> bool:
        """Whether f becomes keys and values in this mixer: behind the window, or remembered."""
        remembered = mixer == "bmojo" and self.eidetic_tokens and self.eidetic_content == "fading"
        return mixer in ("bmojo_f", "bmojo") and bool(self.fading_span or remembered)

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
        check_literals("optim.", self)
        for name in ("learning_rate", "clip_norm", "eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"optim.{name}", value, "> 0 and finite")
        check_at_least("optim.", self, 0, ("warmup_steps", "weight_decay"))
        check_at_least("optim.", self, 1, ("accumulate",))
        for name in ("decay_fraction", "final_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name}", value, "in [0, 1]")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}", value, "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Documents: where they come from."""

    # text: files with one document each, JSONL and tar, each also as .gz, .xz, .zst;
    # tfds: a dataset of TensorFlow Datasets; tokens: what bmojo_jax.data.tokenize has written;
    # needles: generated prompts (bmojo_jax/data/tasks/needles.py).
    source: Literal["text", "tfds", "tokens", "needles"] = "text"
    # text: a folder or one file; tfds: its data_dir, empty for the usual one; tokens: the folder;
    # needles: text to hide them in, as for source "text"; empty: a repeated sentence.
    path: str = ""
    # text, needles: glob of documents, e.g. "**/*.txt" or "**/train/*" (what lies in an archive is
    # named ARCHIVE/MEMBER); empty: every file without NUL bytes.
    include: str = ""
    exclude: tuple[str, ...] = ()  # names of folders, anywhere below path, to leave out
    # tfds: NAME, NAME/CONFIG or NAME/CONFIG:VERSION; needles: variants, comma-separated, e.g.
    # "single_1,multikey_1"; empty: all of them.
    name: str = ""
    split: str = "train"  # tfds, tokens: the split to train on
    text_field: str = "text"  # JSONL, tfds: the field that holds a document
    weight: float = 1.0  # share of the training rows, relative to the other sources

    def check(self, prefix: str) -> None:
        """Raises ValueError naming the field, e.g. "data.weight" with prefix "data."."""
        check_literals(prefix, self)
        require(
            0 < self.weight < math.inf, f"{prefix}weight", self.weight, "a number > 0 and finite"
        )


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Documents and how they become rows of tokens. The inherited fields are the main source."""

    mixed_in: tuple[SourceConfig, ...] = ()  # further sources; they are trained on only
    # Held out of the main source. text: the glob of the documents, as `include`; empty: a fraction
    # of those that `include` matches, by a hash of their names.
    validation_include: str = ""
    validation_fraction: float = 0.05
    validation_split: str = "validation"  # tfds, tokens
    # "bytes", or the path of a tokenizer.json (Hugging Face tokenizers) or *.model (SentencePiece).
    tokenizer: str = "bytes"
    # The token between documents; empty: the first of the usual ones that the tokenizer has.
    boundary_token: str = ""
    not_utf8: Literal["skip", "replace"] = "skip"  # documents that are not; "replace": by U+FFFD
    longest_document: int = 16 * 2**20  # bytes; a longer document of plain text is cut into several
    sequence_length: int = 1024  # L
    batch_size: int = 8  # rows of a step, over all devices and micro-batches
    # "anywhere": documents follow one another; "chunk": each starts at a multiple of
    # model.chunk, which makes its result independent of what is packed beside it.
    document_start: Literal["anywhere", "chunk"] = "anywhere"
    # Rows from which the next one is drawn, so that a long document does not fill whole batches;
    # they are held in memory. 1: rows keep the order of their documents.
    shuffle_window: int = 1024
    seed: int = 0
    workers: int = 0  # reader processes of a shard; 0 reads in threads of this process
    # In how many parts the documents are read, each for some of the rows of a batch. A run can go
    # on on as many readers (processes with rows of their own) as divide it; 0: as it starts on.
    shards: int = 0

    def __post_init__(self) -> None:
        self.check("data.")
        for i, source in enumerate(self.mixed_in):
            source.check(f"data.mixed_in[{i}].")
        require(self.tokenizer != "", "data.tokenizer", "", '"bytes" or the path of a file')
        check_at_least(
            "data.",
            self,
            1,
            ("sequence_length", "batch_size", "shuffle_window"),
        )
        # A part holds a character, of up to 4 bytes.
        check_at_least("data.", self, 4, ("longest_document",))
        check_at_least("data.", self, 0, ("workers", "shards"))
        require(0 <= self.seed < 2**32, "data.seed", self.seed, "in [0, 2**32)")
        require(
            0 < self.validation_fraction < 1,
            "data.validation_fraction",
            self.validation_fraction,
            "in (0, 1)",
        )


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A synthetic task in place of text, trained at several rates and seeds at once.

    Of the section `data`, only sequence_length, batch_size and seed hold for a task.
    """

    # "none": text. mqar: data/tasks/mqar.py; the others: data/tasks/mad.py.
    name: Literal[
        "none",
        "mqar",
        "in_context_recall",
        "noisy_recall",
        "fuzzy_recall",
        "selective_copying",
        "memorization",
    ] = "none"
    vocab_size: int = 8192  # words of the task; model.vocab_size must be at least that
    pairs: tuple[int, ...] = (64,)  # mqar: keys with a value in a row; several: rows in turn
    filler: Literal["random", "zero"] = "random"  # mqar: what stands between the queries
    train_examples: int = 0  # seen again in every epoch, shuffled; 0: every example is a new one
    test_examples: int = 1280  # the same at every evaluation, for every rate and seed
    # Peak learning rates, each with `seeds` replicas; empty: optim.learning_rate.
    rates: tuple[float, ...] = ()
    seeds: int = 1  # the i-th adds i to seed (parameters) and, in training, to data.seed
    replicas_at_once: int = 0  # on a device, if they do not fit together; 0: all of them

    def __post_init__(self) -> None:
        check_literals("task.", self)
        check_at_least("task.", self, 2, ("vocab_size",))
        check_at_least("task.", self, 1, ("test_examples", "seeds"))
        check_at_least("task.", self, 0, ("train_examples", "replicas_at_once"))
        require(
            bool(self.pairs) and min(self.pairs) >= 1,
            "task.pairs",
            self.pairs,
            "one or more numbers >= 1",
        )
        require(
            all(0 < rate < math.inf for rate in self.rates)
            and len(set(self.rates)) == len(self.rates),
            "task.rates",
            self.rates,
            "different numbers, each > 0 and finite",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1: whatever is left."""

    data: int = -1  # batch, parameters replicated
    fsdp: int = 1  # batch, parameters cut
    context: int = 1  # tokens of a row, parameters cut
    tensor: int = 1  # heads, SSM channels, MLP hidden units, vocabulary

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(
                isinstance(size, int) and (size == -1 or size >= 1),
                f"mesh.{name}",
                size,
                "-1 or a positive integer",
            )
        free = [name for name, size in sizes.items() if size == -1]
        require(len(free) <= 1, f"mesh.{'/'.join(free)}", -1, "-1 for one axis at most")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run: everything that `train.py` needs beside the work directory."""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
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
        check_literals("", self)
        check_at_least(
            "",
            self,
            1,
            "steps vocab_chunk log_every eval_every checkpoint_every keep_last".split(),
        )
        check_at_least(
            "", self, 0, ("seed", "z_loss", "eval_batches", "keep_best", "sample_tokens")
        )
        require(
            self.data.batch_size % self.optim.accumulate == 0,
            "data.batch_size",
            self.data.batch_size,
            f"a multiple of optim.accumulate={self.optim.accumulate}",
        )
        require(
            self.compare_with == "nothing" or self.eval_batches == 0,
            "eval_batches",
            self.eval_batches,
            f"0, the whole split, with compare_with={self.compare_with!r}",
        )
        require(
            self.optim.warmup_steps <= self.steps,
            "optim.warmup_steps",
            self.optim.warmup_steps,
            f"at most steps={self.steps}",
        )
        require(
            self.task.name == "none" or self.optim.accumulate == 1,
            "optim.accumulate",
            self.optim.accumulate,
            f"1 with task.name={self.task.name!r}",
        )


def setting_names() -> list[str]:
    """The names of all settings of a run, e.g. "model.window"."""
    return settings.names(TrainConfig)


def check_name(name: str) -> None:
    """Raises ValueError if `name` is not a setting; suggests the nearest.

    An element of a tuple is named by its place: "data.mixed_in[0].weight".
    """
    setting, _, rest = name.partition("[")
    if setting not in setting_names():
        raise ValueError(settings.unknown(setting, TrainConfig))
    place, _, field = rest.partition("].")
    if field and field not in settings.names(SourceConfig):
        nearest = settings.nearest(field, SourceConfig)
        raise ValueError(f"{name} is not a setting; did you mean {setting}[{place}].{nearest}?")


def from_config_dict(config: ml_collections.ConfigDict) -> TrainConfig:
    """The checked TrainConfig of a (possibly overridden) ConfigDict."""
    return settings.from_dict(TrainConfig, settings.plain_values(config))
