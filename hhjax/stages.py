"""The kinds of stages, what each is made of, and what the loop that runs one is given.

A new kind of stage is one dataclass here and one line in `launch.LOOPS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp

from hhjax.clinic.corpus import PARTS, write_part
from hhjax.clinic.gold import Raters
from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import ExamData, TextData
from hhjax.data.tokenizer import ALGORITHMS
from hhjax.fields import ConfigError, conform, hinted_fields
from hhjax.model.generate import Sampling
from hhjax.model.transformer import RunConfig
from hhjax.objectives.kl import KLConfig
from hhjax.objectives.lm import LMLoss, lm_objective
from hhjax.objectives.ppo import PPOLoss, ppo_objective
from hhjax.objectives.preference import PreferenceLoss, preference_objective
from hhjax.sharding import MeshConfig
from hhjax.train.rollout import RolloutConfig
from hhjax.train.state import OptimConfig
from hhjax.types import LossFn

DEFAULT_SIZE = "1M"


# Fields and references -------------------------------------------------------------------------------------------------


def execution(default, **metadata):
    """A field that says how a stage runs, not what it computes: it stays out of the identity."""
    return field(default=default, metadata={"identity": False, **metadata})


def reference(*kinds: str, default=dataclasses.MISSING):
    """A field that names earlier stages of these kinds, or folders (any text with `/` or `://`)."""
    return field(default=default, metadata={"ref": kinds})


def split_step(ref: str) -> tuple[str, int | None]:
    """`lm@200` -> ("lm", 200); without a step, None, which means the last."""
    target, at, step = ref.rpartition("@")
    return (target, int(step)) if at and step.isdigit() else (ref, None)


def is_path(ref: str) -> bool:
    return "/" in ref


# The kinds -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One step of an experiment. Subclasses say what it reads and how it is run.

    kind: the folder under OUT and the key of its loop. seeded: whether the experiment's seed matters to it.
    Raises ConfigError on a value of the wrong type.
    """

    kind: ClassVar[str]
    seeded: ClassVar[bool] = True
    name: str = field(metadata={"identity": False})

    def __post_init__(self):
        for f, hint in hinted_fields(type(self)):
            object.__setattr__(self, f.name, conform(getattr(self, f.name), hint, f"{self.name}.{f.name}"))

    def require_positive(self, *names: str) -> None:
        """Raises ConfigError unless each of these fields is at least 1, or None where it may be."""
        for name in names:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{self.name}.{name}={value}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Tokenizer(Stage):
    """A SentencePiece model trained on text; the experiment's seed does not enter, so that seeds share it."""

    kind: ClassVar[str] = "tokenizer"
    seeded: ClassVar[bool] = False
    data: TextData = TextData()
    vocab: int = 4096
    algorithm: str = "unigram"  # or "bpe", which is the one that reaches a thousand pieces in a text of a few hundred words

    def __post_init__(self):
        super().__post_init__()
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"{self.name}.algorithm={self.algorithm!r}; choose one of {', '.join(ALGORITHMS)}")


@dataclass(frozen=True, kw_only=True)
class Clinic(Stage):
    """A part of the simulated clinic's data, see docs/clinic.md: "helpful" or "harmless" comparisons, "text", or an "exam".

    size: rows of training comparisons, documents or questions. raters: who compares. writer: what writes the files, which a
    world of your own replaces: (folder, part, size, raters, seed) -> {file: rows}.
    """

    kind: ClassVar[str] = "clinic"
    part: str
    size: int = 4000
    raters: Raters = Raters()
    writer: Callable = write_part
    seed: int | None = execution(None)

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("size")
        if self.writer is write_part and self.part not in PARTS:
            raise ConfigError(f"{self.name}.part={self.part!r}; choose one of {', '.join(PARTS)}")


@dataclass(frozen=True, kw_only=True)
class Questions(Stage):
    """Questions of public exams in one layout, for Exam stages. They are the same for every seed."""

    kind: ClassVar[str] = "questions"
    seeded: ClassVar[bool] = False
    data: ExamData = ExamData()


@dataclass(frozen=True, kw_only=True)
class Training(Stage):
    """What every gradient-trained stage has.

    steps: updates; None means `epochs` passes over the data. batch_size: rows (pairs, for a PM) an update.
    seed: None means the experiment's. eval_rows: the most held-out rows a periodic evaluation reads.
    The rest is execution: micro_batches cut a batch, `keep` is how many checkpoints stay, intervals are in
    updates (eval_every and save_every 0: only at the end), watchdog_s kills a step that hangs (0: never).
    """

    init: str | None = reference("lm", "pm", "ppo", default=None)
    tokenizer: str | None = reference("tokenizer", default=None)
    model: str | None = None  # a row of model/sizes.py, where nothing is given by `init`
    seq_len: int = 256
    batch_size: int = 32
    epochs: float = 1.0
    steps: int | None = None
    optim: OptimConfig = OptimConfig()
    seed: int | None = execution(None)  # the seed that results is part of the identity
    micro_batches: int = execution(1)
    mesh: MeshConfig = execution(MeshConfig())
    run: RunConfig = RunConfig()
    log_every: int = execution(10)
    eval_every: int = execution(0)
    eval_rows: int = execution(512)
    save_every: int = execution(200)
    keep: int = execution(2)
    watchdog_s: float = execution(1800.0)

    def __post_init__(self):
        super().__post_init__()
        if self.init and self.model:
            raise ConfigError(f"{self.name}.model={self.model!r} has no effect beside init={self.init!r}; leave it out")
        if not self.init and not self.tokenizer:
            raise ConfigError(f"{self.name} has neither init nor tokenizer; name a stage or a folder in one of them")
        self.require_positive("seq_len", "batch_size", "micro_batches", "log_every", "keep", "steps")
        if self.epochs <= 0:
            raise ConfigError(f"{self.name}.epochs={self.epochs}; it must be positive")
        if self.steps and self.epochs != 1:
            raise ConfigError(f"{self.name}.epochs={self.epochs} has no effect beside steps={self.steps}; set steps to None first, or epochs to 1")


@dataclass(frozen=True, kw_only=True)
class LM(Training):
    """A language model, trained on documents. objective: (model, loss config) -> LossFn over Tokens."""

    kind: ClassVar[str] = "lm"
    data: TextData = TextData()
    objective: Callable = lm_objective
    loss: Any = LMLoss()  # whatever frozen dataclass the objective takes


@dataclass(frozen=True, kw_only=True)
class PM(Training):
    """A preference model, one epoch at a constant rate (Bai et al. 2022, section 3.1).

    init: the LM it starts from, with a fresh score head; or None with `tokenizer` and `model`, for none.
    packed: comparisons lie end to end in rows, each prompt once, and every batch has short and long ones; False gives every reply a
    row of its own, with its prompt, in batches of like lengths.
    objective: (model, loss config) -> LossFn over PackedPairs and Pairs (held-out comparisons have rows of their own).
    """

    kind: ClassVar[str] = "pm"
    data: ComparisonData = ComparisonData()
    packed: bool = True
    objective: Callable = preference_objective
    loss: Any = PreferenceLoss()  # whatever frozen dataclass the objective takes


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Scores the test split of `data` with a PM; `baselines` adds the length rule and the bag of words. raters: the simulated
    ones that labelled the tests, where they did: what their noise leaves to be had is told beside the accuracy."""

    kind: ClassVar[str] = "evaluate"
    of: str = reference("pm")
    data: ComparisonData = ComparisonData()
    baselines: bool = True
    raters: Raters | None = None
    batch_size: int = execution(64)
    mesh: MeshConfig = execution(MeshConfig())


@dataclass(frozen=True, kw_only=True)
class PPO(Stage):
    """A policy steered by a preference model, with a KL penalty to where it began (Bai et al. 2022, section 4.1).

    policy: the model that is trained; kl_to: the reference of the KL (default: the policy at its start). reward: the PM;
    tests: PMs that are only looked at. value: what the value network starts from (default: the reward PM), or
    value_head=True: a head on the policy's trunk instead, trained by optim and not by value_optim. data: where prompts come from,
    training and held-out ones.
    batch_size samples an iteration, one a prompt; steps iterations; epochs and minibatches of each (the paper: K = 1 for
    a static scan, 2 for robustness, 4 online). objective: (Actor, loss config) -> LossFn over Rollout.
    eval_every: iterations between looks at eval_prompts held-out prompts (0: first and last). rollout_mesh: the layout of
    sampling, where it is not the layout of training. packed: whether models read several replies a row, each behind its prompt, or
    one, padded to the longest there can be (default: where a device has at least 16 of a minibatch, which fill rows well); the results
    are the same. watch: (prompts, replies) -> {name: a number a reply, nan where it
    does not apply}, logged as means `watch/NAME`: what you want to know of the text, such as the clinic's gold utilities.
    """

    kind: ClassVar[str] = "ppo"
    policy: str = reference("lm", "ppo")
    reward: str = reference("pm")
    kl_to: str | None = reference("lm", "ppo", default=None)
    tests: tuple[str, ...] = reference("pm", default=())
    value: str | None = reference("pm", "lm", default=None)
    value_head: bool = False
    data: ComparisonData = ComparisonData()
    prompt_len: int = 128
    sampling: Sampling = Sampling()
    batch_size: int = 64
    steps: int = 200
    epochs: int = 1
    minibatches: int = 1
    kl: KLConfig = KLConfig()
    rollout: RolloutConfig = RolloutConfig()
    packed: bool | None = execution(None)
    objective: Callable = ppo_objective
    loss: Any = PPOLoss()  # whatever frozen dataclass the objective takes
    watch: Callable | None = None
    optim: OptimConfig = OptimConfig(lr=1e-4, warmup_steps=10)
    value_optim: OptimConfig = OptimConfig(lr=3e-4, warmup_steps=10)
    seed: int | None = execution(None)
    micro_batches: int = execution(1)
    mesh: MeshConfig = execution(MeshConfig())
    rollout_mesh: MeshConfig | None = execution(None)
    run: RunConfig = RunConfig()
    log_every: int = execution(1)
    eval_every: int = execution(0)
    eval_prompts: int = 64  # what scores are centred on too, so no mere execution field
    save_every: int = execution(50)
    keep: int = execution(2)
    watchdog_s: float = execution(1800.0)

    def __post_init__(self):
        super().__post_init__()
        if self.value and self.value_head:
            raise ConfigError(f"{self.name}.value={self.value!r} has no effect beside value_head=True; leave one out")
        if self.sampling.top_k or self.sampling.top_p < 1 or not self.sampling.temperature:
            raise ConfigError(f"{self.name}.sampling={self.sampling}: PPO needs the probability of what was drawn; "
                              f"use top_k=0, top_p=1 and a positive temperature")  # fmt: skip
        self.require_positive("prompt_len", "batch_size", "steps", "epochs", "minibatches", "micro_batches", "log_every", "keep",
                              "eval_prompts")  # fmt: skip
        if not self.kl.beta >= 0:
            raise ConfigError(f"{self.name}.kl.beta={self.kl.beta}; it must be at least 0")
        if self.kl.target is not None and self.kl.horizon <= 0.2 * self.batch_size:
            raise ConfigError(f"{self.name}.kl.horizon={self.kl.horizon} lets one batch of {self.batch_size} move beta by more "
                              f"than itself; choose more than {0.2 * self.batch_size:.0f}")  # fmt: skip
        if self.batch_size % (self.minibatches * self.micro_batches):
            raise ConfigError(f"{self.name}.batch_size={self.batch_size} does not divide into {self.minibatches} "
                              f"minibatches of {self.micro_batches} parts; choose a multiple of their product")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sampled(Stage):
    """What the stages have that draw replies from finished policies. prompts: how many; each cut to prompt_len tokens."""

    data: ComparisonData = ComparisonData()
    prompts: int = 64
    prompt_len: int = 128
    sampling: Sampling = Sampling()
    batch_size: int = execution(64)
    mesh: MeshConfig = execution(MeshConfig())
    run: RunConfig = RunConfig()

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("prompts", "prompt_len", "batch_size")


@dataclass(frozen=True, kw_only=True)
class BestOfN(Sampled):
    """Rejection sampling: the best of n replies by a PM, for every n in `ns` (Bai et al. 2022, section 4.5, appendix B.6).

    max(ns) replies to each of `prompts` held-out prompts are drawn from `policy` and scored by reward, tests and `watch`,
    which is PPO's.
    """

    kind: ClassVar[str] = "best_of_n"
    policy: str = reference("lm", "ppo")
    reward: str = reference("pm")
    tests: tuple[str, ...] = reference("pm", default=())
    ns: tuple[int, ...] = (1, 4, 16, 64)
    watch: Callable | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.ns or min(self.ns) < 1:
            raise ConfigError(f"{self.name}.ns={self.ns}; give at least one number, each at least 1")


@dataclass(frozen=True, kw_only=True)
class Comparisons(Sampled):
    """Fresh comparisons for an online round: pairs of replies by `policies`, labelled by simulated raters, or by a PM in the
    place of people.

    Each of `prompts` training prompts gets two replies, by policies drawn at random (several snapshots at once, as in
    Bai et al. 2022, section 4.5); the label is drawn with probability sigmoid(difference / noise); at noise 0 the
    better one always wins. Equal replies are left out. Writes comparisons.jsonl.gz, which a PM stage takes as a source.
    best_of: each reply is the best of so many by the PM `ranker` (rejection sampling). skip: how many prompts of the seed's order
    to pass over first, so that the tranches of a loop have prompts of their own.
    """

    kind: ClassVar[str] = "comparisons"
    policies: tuple[str, ...] = reference("lm", "ppo")
    labeler: str | None = reference("pm", default=None)
    raters: Raters | None = None
    ranker: str | None = reference("pm", default=None)
    best_of: int = 1
    noise: float = 1.0
    prompts: int = 512
    skip: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not self.policies or self.best_of < 1 or self.noise < 0 or self.skip < 0:
            raise ConfigError(f"{self.name}: name at least one policy; best_of={self.best_of} must be at least 1, and "
                              f"noise={self.noise} and skip={self.skip} at least 0")  # fmt: skip
        if bool(self.labeler) == bool(self.raters):
            raise ConfigError(f"{self.name}: labeler={self.labeler!r} and raters={self.raters}: give one of them")
        if self.raters and self.noise != 1.0:
            raise ConfigError(f"{self.name}.noise={self.noise} has no effect beside raters, which have a noise of their own: raters.noise")
        if (self.best_of > 1) != bool(self.ranker):
            raise ConfigError(f"{self.name}: best_of={self.best_of} and ranker={self.ranker!r} need each other")


@dataclass(frozen=True, kw_only=True)
class Elo(Sampled):
    """Ratings of policies by who wins comparisons, beside what preference models would have guessed (Bai et al. 2022, section
    2.3, appendix B.4).

    Every policy answers each of `prompts` held-out prompts, and any two different replies to one are compared by `raters`. The
    first policy is the anchor, at 0. guesses: PMs whose mean score above the anchor's, times 174, is the naive estimate.
    """

    kind: ClassVar[str] = "elo"
    policies: tuple[str, ...] = reference("lm", "ppo")
    raters: Raters = Raters()
    guesses: tuple[str, ...] = reference("pm", default=())
    prompts: int = 256

    def __post_init__(self):
        super().__post_init__()
        if len(set(self.policies)) < max(2, len(self.policies)):
            raise ConfigError(f"{self.name}.policies={self.policies}; name at least two, each once")


@dataclass(frozen=True, kw_only=True)
class Exam(Stage):
    """Multiple-choice questions to a language model or policy, by the probability of the options (Bai et al. 2022, section 4.6).

    data: where exam.jsonl.gz lies: rows {"subject", "question", "options", "answer"}, and {"continues": true} where the options go on
    from the question's text. shots: solved questions before each. Nothing in it is drawn, so that the experiment's seed does not
    enter.
    """

    kind: ClassVar[str] = "exam"
    seeded: ClassVar[bool] = False
    of: str = reference("lm", "ppo", "pm")
    data: str = reference("clinic", "questions")
    shots: tuple[int, ...] = (0, 3)
    batch_size: int = execution(64)
    mesh: MeshConfig = execution(MeshConfig())
    run: RunConfig = RunConfig()

    def __post_init__(self):
        super().__post_init__()
        if not self.shots or min(self.shots) < 0:
            raise ConfigError(f"{self.name}.shots={self.shots}; give at least one number, each at least 0")


@dataclass(frozen=True, kw_only=True)
class Detect(Stage):
    """Out-of-distribution detection: are prompts of `outside` told from those of `inside` by a layer's activations?

    of: the model. layer: how many of its layers are run. fit: training prompts of `inside` that the Gaussian is fitted to.
    exposure: numbers of outside examples that a linear probe is shown. noise: share of the words of every prompt that are
    replaced by words of other prompts, which makes clean prompts of a small world harder to tell (Bai et al. 2022, section 5.4).
    openings: the first Human turn of every dialogue alone, where dialogues of the two sides could be told by their lengths.
    """

    kind: ClassVar[str] = "detect"
    of: str = reference("lm", "pm", "ppo")
    inside: ComparisonData = ComparisonData(("helpful-base",))
    outside: ComparisonData = ComparisonData(("harmless-base",))
    layer: int = 1
    fit: int = 200
    exposure: tuple[int, ...] = (1, 10, 100)
    noise: float = 0.0
    openings: bool = False
    prompt_len: int = 128
    batch_size: int = execution(64)
    mesh: MeshConfig = execution(MeshConfig())
    run: RunConfig = RunConfig()

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("layer", "fit", "prompt_len", "batch_size")
        if not 0 <= self.noise < 1:
            raise ConfigError(f"{self.name}.noise={self.noise}; it must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class Report(Stage):
    """Tables and figures from the stages it names.

    draw: (run directories by reference, folder to write in) -> the text to print; None: tables, calibration and turns of
    evaluations.
    """

    kind: ClassVar[str] = "report"
    of: tuple[str, ...] = reference("evaluate", "ppo", "best_of_n", "elo", "exam", "detect", "comparisons")
    draw: Callable | None = None


def references(stage: Stage, earlier) -> list[tuple[str, str, tuple[str, ...]]]:
    """Every (field, reference text, kinds it may be) of a stage, models before data.

    earlier: names of the stages before it; a data source of such a name is a reference too.
    """
    found, data = [], []
    for f in dataclasses.fields(stage):
        value = getattr(stage, f.name)
        if (kinds := f.metadata.get("ref")) and value:
            found += [(f.name, ref, kinds) for ref in ((value,) if isinstance(value, str) else value)]
        elif isinstance(value, ComparisonData | TextData):
            kinds = ("comparisons", "clinic") if isinstance(value, ComparisonData) else ("clinic",)
            data += [(f"{f.name}.sources", s, kinds) for s in value.sources if split_step(s)[0] in earlier]
    return found + data


# What a loop is given, and how it ends early ---------------------------------------------------------------------------


class Preempted(Exception):
    """Raised by a loop that was told to stop and has saved; the process exits with 75."""


class Diverged(Exception):
    """Raised by a loop whose loss is no longer finite; the process exits with 65."""


@dataclass(frozen=True)
class StageContext:
    """All that a loop `run(stage, ctx)` is given besides the stage.

    dir: the run directory, made and locked; seed: the stage's. parents: reference text as the stage writes it
    (a stage name, `name@step` or a folder) -> that folder; parent_stages: the same -> its config.json ({} if it
    has none). should_stop(): poll once an update, or batch, on every host; once it
    says True it stays so, and the loop saves and raises Preempted. A loop returns None when the stage is
    finished (launch then writes DONE), and raises Diverged on a loss that is not finite.
    """

    dir: Path
    seed: int
    parents: Mapping[str, Path]
    parent_stages: Mapping[str, dict]
    data_dir: Path | None = None
    should_stop: Callable[[], bool] = lambda: False

    def stop_if_told(self) -> None:
        """A poll where nothing is to be saved: raises Preempted when told to stop."""
        if self.should_stop():
            raise Preempted(f"{self.dir.name} was told to stop; what is not saved of it is done anew")

    def parent(self, ref: str) -> tuple[Path, int | None]:
        """A reference's folder and the step it asks for (None: the last)."""
        return self.parents[ref], split_step(ref)[1]


def loss_of(stage, model) -> LossFn:
    """The objective of an LM, PM or PPO stage on its model (PPO: actor). Where it is traced, before anything is trained, raises ConfigError
    unless it returns a scalar and a dict of scalars, of which an LM's or PM's evaluation needs `weight`."""
    loss = stage.objective(model, stage.loss)

    def checked(params, batch, key):
        said = loss(params, batch, key)
        wrong = ""
        if not (isinstance(said, tuple) and len(said) == 2 and isinstance(said[1], dict)):
            wrong = "is no pair of a scalar and a dict of scalars"
        elif jnp.shape(said[0]):
            wrong = f"has shape {jnp.shape(said[0])}; return a mean, a scalar"
        elif vectors := [name for name, x in said[1].items() if x is None or isinstance(x, dict) or jnp.shape(x)]:
            wrong = f"has metrics that are no scalars: {', '.join(vectors)}; return their means"
        elif isinstance(stage, Training) and "weight" not in said[1]:
            wrong = "has no metric `weight`, by which held-out batches are averaged; return the number of pairs or tokens that it is the mean of"
        if wrong:
            raise ConfigError(f"what the loss of {stage.name} returns {wrong}")
        return said

    return checked
