"""A TOML file plus `key=value` overrides become one frozen, fully checked `Recipe`.

In: a path, overrides as the user typed them. Out: a `Recipe`, or one `RecipeError` that lists everything that is wrong
with it. Invariant: a key that no class here declares is refused, with the nearest name suggested; a default is written
once, at its attribute, and its docstring is the reference documentation (`docs/recipe.md` is generated from here).
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import shlex
import string
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ctxdistill import files
from ctxdistill.errors import RecipeError, several
from ctxdistill.trust import outside

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]  # of rows of which some are left
AboveZero = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
AtLeastZero = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]

COMPARE = "`ctxdistill init` writes a recipe with comments, to compare with"
"""What helps with any recipe."""


def _no_path(name: str) -> str:
    if name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError(
            f"name: expected the name of a folder in runs/, found {name!r}; another folder is chosen with --out"
        )
    return name


FolderName = Annotated[str, AfterValidator(_no_path)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelSection(Section):
    """The one model that is teacher (adapter off, context in its prompt) and student (adapter on, no context)."""

    name: Annotated[str, Field(min_length=1)]
    """Hub id, local folder, or path of a `.gguf` file (converted once to safetensors in the cache folder)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit). Unset: the hub's default branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights. `auto`: float32 on CPU, else bfloat16 if the device has it, else float32. Some processors
    (AVX512-BF16, AMX) are much faster in bfloat16, others much slower; `ctxdistill plan` says which yours is."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Keep the frozen weights of the linear layers in 8 bits (LLM.int8) or 4 (NF4), with bitsandbytes: teacher, base model
    and student are then all the quantised model. `dtype` is what is computed in. Head, embeddings and adapter stay as they are."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes the first accelerator there is."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you say so; recorded in the adapter card."""
    window: NotNegative = 0
    """Longest sequence in tokens, prompt and answer, where it shall be shorter than the model's own (a server's limit, for
    example); 0: the model's."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention kernel of transformers; `auto` takes the fastest that the model supports."""


class DataSection(Section):
    """Where rows come from and how their columns are called. Columns are named, never guessed."""

    data: str | None = None
    """A `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file (relative to the recipe), or `hub:owner/name` (its class
    labels are read as their names)."""
    config: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    skip: NotNegative = 0
    """Pass over so many rows first: one file may hold the queries and the held-out rows."""
    limit: NotNegative = 0
    """Use only the first rows (after `skip`); 0 means all. The number of rows left out is reported."""
    prompt: str = "prompt"
    """Column with the query text. Not needed when `prompt.pattern` names other columns, or `messages` is given."""
    messages: str | None = None
    """Column with a list of chat messages (`role`, `content`) instead of a text."""
    turns: Literal["query", "answered", "conversation"] = "query"
    """What `messages` holds. `query`: what both sides see, the question last. `answered`: behind it the assistant's answer,
    which becomes the column `answer`. `conversation`, as in fine-tuning files: also a first system turn, which the student
    does not see; it must be `context.system`, or `context.column = "system"` makes it each row's context."""
    taught: Literal["last", "every"] = "last"
    """Where `messages` hold answers: `last` teaches the last assistant's turn, `every` each one, as a row of its own that
    ends before it."""
    answer: str = "answer"
    """Column with the reference answer. Rows without it can be trained on, but not scored for accuracy."""
    duplicates: Literal["error", "drop"] = "error"
    """What to do with rows whose query already occurred. `drop` keeps the first and reports how many were dropped."""


class QueriesSection(DataSection):
    """What the student is asked in training. Rows that you give (`data`), rows that the model writes from the context
    (`synthesize`), or both. Columns are named, never guessed."""

    synthesize: NotNegative = 0
    """Let the model write so many queries from the context alone; `[synthesis]` says how. They are in a file that you can
    read and change before training (`ctxdistill queries`)."""


SeedKind = Literal["question", "summarise", "use", "structure", "contradict", "creative", "request"]


class SynthesisSection(Section):
    """How queries are written from the context (`queries.synthesize`): each from one chunk of it, about one of its
    sentences, by one kind of seed prompt. No rows with a context of their own (`context.column`)."""

    kinds: list[SeedKind] = []
    """Kinds of seed prompt, in turn (one named twice gets twice as many): `question` on a passage, `summarise`, `use` it in
    a task, `structure` it (list, table), `contradict` it, `creative`; `request` is what a user of the described assistant
    would send. Empty: the first six where there are documents, else `request`, `question`, `use`, `contradict` and
    `creative`."""
    chunk_tokens: Annotated[int, Field(ge=32)] = 256
    """Longest piece of the context that a query is written from. Shorter than what the teacher reads: more even cover,
    and small models lose less of it."""
    per_chunk: NotNegative = 0
    """Most queries from one chunk; 0: as many as its share of the text."""
    attempts: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 4.0
    """Most candidates per wanted query. A chunk that has no more to give ends with fewer queries, which is said."""
    similarity: AboveZero = 0.7
    """A candidate is dropped when its word 3-grams are this similar (shared / all) to those of another query,
    demonstration or held-out row; above 1 drops equal ones only."""
    temperature: AtLeastZero = 0.7
    """Sampling temperature of the writer. Small models need a low one."""
    max_new_tokens: Positive = 64
    """Longest candidate."""
    seed: int = 0
    """Seed of the sentences chosen and of sampling."""
    held_out: Literal["query", "chunk"] = "query"
    """What is split into training, validation and, without `eval.data`, evaluation: `query`, so that all chunks are
    taught, or `chunk`, so that all queries of a chunk are on one side."""
    file: str | None = None
    """Where the queries are. Unset: `queries.jsonl` in the run folder. A file that is there is used as it is. Below the
    recipe's folder or the working directory."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server (vLLM, for example) that writes instead of the local model, such as
    `http://localhost:8000/v1`."""
    endpoint_model: str | None = None
    """The model's name there."""
    key_variable: str | None = None
    """Name of the environment variable that holds the server's API key. The key itself never goes into a recipe."""
    retries: NotNegative = 5
    """How often a request is tried again, after 1, 2, 4, ... seconds or what the server says."""
    timeout: AboveZero = 120.0
    """Seconds to wait for an answer."""


class ContextSection(Section):
    """What the teacher sees and the student does not. Several kinds may be combined; their order in the prompt is:
    system, documents (appended to the system text), messages, demonstrations, query."""

    system: str | None = None
    """System prompt, as text."""
    system_file: str | None = None
    """System prompt, as a text file."""
    documents: list[str] = []
    """Text files that are put into the system prompt after the system text, each under its file name."""
    chunk_tokens: NotNegative = 0
    """Split the documents into chunks of at most so many tokens, by paragraphs, then sentences: for each query the teacher
    reads the one chunk that the query is about, and the student learns from all. 0: the teacher reads all documents whole."""
    chunk_overlap: NotNegative = 32
    """Tokens that a chunk may repeat of the end of the one before."""
    chunk_column: str = "chunk"
    """The column that names a query's chunk, such as `handbook.md:2`. Written queries have it."""
    chunk_bind: Literal["column", "words"] = "column"
    """A query without that column is an error (`column`), or belongs to the chunk with which it shares most words, rare
    ones counting more (`words`)."""
    messages: str | None = None
    """A JSON or JSONL file with a message history (`role`, `content`)."""
    demos: str | None = None
    """Demonstrations: a data file (as in `queries.data`) with a query and an answer per row."""
    demos_limit: NotNegative = 0
    """Use only the first demonstrations; 0 means all."""
    column: str | None = None
    """A column of the query rows with a context of their own: a text (used as system prompt) or a list of messages
    (put before the query), as in other tools' `privileged_context`."""
    teacher_prompt: str | None = None
    """A column of the query rows with the teacher's whole prompt: a text or a list of messages that already
    contains the query. Excludes all other kinds."""
    student_system: str | None = None
    """System prompt that the student keeps, in training and in serving. Unset: no system message is passed, and the
    chat template may insert its own default, which `ctxdistill show` marks. An empty string passes an empty one."""
    student_demos: NotNegative = 0
    """The student keeps the last n demonstrations."""


class PromptSection(Section):
    """How a row becomes a prompt."""

    style: Literal["chat", "text"] = "chat"
    """`chat` renders messages with the model's chat template; `text` joins instruction, demonstrations and query."""
    pattern: str = "{prompt}"
    """The query, with `{column}` fields. `{prompt}` is the column that `queries.prompt` names."""
    answer_pattern: str = "{answer}"
    """How an answer is written after the query (text style: `" {answer}"` gives the usual leading space)."""
    instruction: str = ""
    """Text style: the text before the demonstrations, in the teacher's prompt."""
    student_instruction: str = ""
    """Text style: the text before the query in the student's prompt."""
    separator: str = "\n\n"
    """Text style: what stands between instruction, demonstrations and query."""
    stop: str = ""
    """Text style: an answer ends where this text appears, and its tokens are supervised as the end. Empty: the
    separator, since a base model that reads demonstrations writes that and not EOS. Chat style ends a turn as the
    template does."""
    label_words: list[str] = []
    """Label tasks: all possible answers. Accuracy is then decided by the log-probability of each whole answer."""
    shared_first_token: Literal["error", "allow"] = "error"
    """Label words that start with the same token cannot be told apart at the first supervised position. `allow` them
    where there are many labels: accuracy is decided by whole answers all the same."""
    template_kwargs: dict[str, Any] = {}
    """Extra arguments of the chat template for both sides, for example `{ enable_thinking = false }`."""
    teacher_template_kwargs: dict[str, Any] = {}
    """Extra arguments of the chat template for the teacher's prompt only."""
    student_template_kwargs: dict[str, Any] = {}
    """Extra arguments of the chat template for the student's prompt only."""


class CompletionsSection(Section):
    """The tokens on which the student learns to agree with the teacher. They end with EOS, which is supervised."""

    source: Literal["teacher", "data", "label"] = "teacher"
    """`teacher`: written by the teacher; `data`: the rows' answers; `label`: the label word that the teacher prefers."""
    temperature: AtLeastZero = 0.0
    """Sampling temperature of the teacher; 0 is greedy."""
    samples: Positive = 1
    """Completions per query (more than one needs a temperature above 0)."""
    max_new_tokens: Positive = 128
    """Longest completion. The number of completions that hit it without EOS is reported."""
    scratchpad: str = ""
    """Put behind the query in the teacher's prompt only, such as `Think step by step. Then write "Answer:" and the answer.`
    Give `max_new_tokens` the room."""
    extract: str | None = None
    """A regular expression with one group: where the answer is in what the teacher wrote (its last match). A training
    completion in which it is not found is rejected, which is counted."""
    teach: Literal["answer", "all"] = "answer"
    """With `extract`: the student learns the answer alone, on which the teacher is asked behind its own thoughts, or all.
    `answer` needs `train.on_policy = 0`: before an answer that the student writes there are no thoughts."""
    checker: str | None = None
    """Your own `module:function` that takes (answer as the teacher wrote it, reference answer, row) and says whether to
    train on it; needs `ctxdistill --allow-code`. The report has the acceptance rate."""
    supervise_end: bool = True
    """Teach where the answer ends, too. Turn off to teach the label position alone, as some papers do."""


class TargetsSection(Section):
    """What is kept of the teacher at each supervised position."""

    kind: Literal["hidden", "full", "topk"] = "hidden"
    """`hidden`: the final hidden state, exact and small (the head is shared); `full`: all log-probabilities;
    `topk`: the k largest plus the tail mass as one more bucket (not exact; the captured mass is reported)."""
    k: Positive = 256
    """Number of tokens kept by `topk`."""
    dir: str | None = None
    """Folder of the target store. Unset: `targets/` in the run folder. Shared between runs, it saves asking the teacher twice.
    Below the recipe's folder or the working directory."""
    batch_size: Positive | None = None
    """Rows per teacher forward pass (fewer where they are long), and per generation and evaluation batch. Unset: 32 on a CPU;
    on an accelerator as many, up to 256, as write side by side with 4 GB of keys and values, or a quarter of what a GPU has
    beside the model. Part of what makes a run
    bit for bit repeatable."""


class TeacherSection(Section):
    """Who labels the training rows, in the place of the local model: a faster engine with the same weights. Gate, evaluation
    and training stay with the local model, with which the engine is compared before anything is trained."""

    engine: Literal["local", "server", "vllm"] = "local"
    """`local`: the model itself. `server`: an OpenAI-compatible server that takes and tells token ids, such as vLLM or
    llama.cpp's. `vllm`: vLLM in this process (needs the package `vllm`). The last two need `targets.kind = "topk"`."""
    endpoint: str | None = None
    """`server`: its base URL, such as `http://localhost:8000/v1`."""
    endpoint_model: str | None = None
    """`server`: the model's name there."""
    key_variable: str | None = None
    """Name of the environment variable that holds the server's API key. The key itself never goes into a recipe."""
    at_once: Positive = 16
    """Most requests (`vllm`: sequences) under way together."""
    retries: NotNegative = 5
    """How often a request is tried again, after 1, 2, 4, ... seconds or what the server says."""
    timeout: AboveZero = 300.0
    """Seconds to wait for an answer."""
    tolerance: AboveZero = 0.01
    """Largest mean KL(engine || local teacher), in nats per token, on the first four rows. An engine has kernels and batches
    of its own; raise this where it may differ more (quantised activations or weights)."""
    memory: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """`vllm`: its share of the GPU's memory. The local model needs the rest."""


class LoraSection(Section):
    """The student's adapter."""

    method: Literal["lora", "dora", "rslora", "cartridge"] = "lora"
    """`lora`; `dora` learns a magnitude of each output beside the update (arXiv 2402.09353); `rslora` multiplies the update
    by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732); `cartridge` changes no layer and trains a key-value
    cache that begins as the context's own (arXiv 2506.06266; wants a `train.lr` of about 0.02). vLLM serves neither `dora`
    nor `cartridge`."""
    tokens: Positive = 64
    """`cartridge`: tokens of the trained cache."""
    rank: Positive = 16
    """Rank of the update. vLLM serves up to 16 without a flag."""
    alpha: AboveZero = 32.0
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Modules to adapt: all linear layers of the blocks, or names such as `["q_proj", "v_proj"]`. Never head or embeddings."""


class TrainSection(Section):
    """The loop."""

    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """`forward_kl` = KL(teacher || student), `reverse_kl` = KL(student || teacher), `jsd` = Jensen-Shannon divergence."""
    temperature: AboveZero = 1.0
    """Both distributions are softened by this; the loss is multiplied by its square."""
    ce_weight: Fraction = 0.0
    """Share of plain cross-entropy on the completion tokens in the loss: (1 - w) * divergence + w * cross-entropy."""
    epochs: Positive = 4
    """Passes over the training queries."""
    on_policy: Fraction = 0.0
    """Share of the completions that the student writes itself, with the adapter as it is at the start of a round, in the
    place of the teacher's; the teacher says how likely it finds their tokens. 0: all from `completions`; 1: all its own."""
    on_policy_ramp: Fraction = 0.0
    """Share of the training during which `on_policy` rises from 0 to its value, round by round; 0: constant."""
    on_policy_temperature: AtLeastZero = 1.0
    """Sampling temperature of the student's completions; 0 is greedy."""
    round_steps: NotNegative = 0
    """Optimizer steps of a round: the student writes for so many steps ahead. 0: an epoch."""
    retain_weight: AtLeastZero = 0.0
    """Adds so many times the divergence from the base model on everyday prompts to the loss, so that what has nothing to do
    with the context stays as it was; each step has a quarter as many of these rows as others, at least one."""
    lr: AboveZero = 5e-4
    """Peak learning rate of AdamW; linear warm-up, then cosine towards `min_lr` times this."""
    min_lr: Fraction = 0.1
    """What the learning rate falls towards, as a fraction of the peak: it would be there one step after the last."""
    warmup: Fraction = 0.1
    """Share of the steps with rising learning rate."""
    schedule: Literal["cosine", "constant", "paper"] = "cosine"
    """The learning rate after the warm-up: `cosine` falls towards `min_lr` times `lr`, `constant` stays. `paper` is what the
    authors' code of arXiv 2409.01930 does: constant, with the warm-up counted in epochs and beginning at 0."""
    shuffle: bool = True
    """See the rows of each epoch in another order."""
    weight_decay: AtLeastZero = 0.0
    """Weight decay of AdamW."""
    clip: AboveZero = 1.0
    """Largest norm of the gradient."""
    batch_size: Positive = 8
    """Rows per optimizer step."""
    micro_batch: NotNegative = 0
    """Rows per forward pass; 0 means the whole batch. Changes memory, not the gradient. A step that a GPU's memory does not
    hold is taken again with half as many, and so are all that follow; the log, the report and `plan` say so."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time. Done by itself where a GPU's memory does
    not hold a step with one row."""
    cuda_graphs: bool = True
    """On a GPU of NVIDIA's, record a step once and replay it with other rows: small models are many short kernels, which
    take longer to start than to run. Left out by itself where it cannot be done: with dropout, with gradient
    checkpointing, for a cartridge or all weights, for models that are padded, in several processes, and for rows of very
    different lengths. Takes about the memory of a second step."""
    validation: Share = 0.1
    """Share of the queries held out to choose the best checkpoint and to stop early (0: train on all, keep the last)."""
    patience: NotNegative = 3
    """Stop after this many epochs without a better validation loss; 0 never stops early."""
    checkpoint_every: NotNegative = 20
    """Steps between checkpoints, from which `--resume` goes on; 0 keeps none."""
    shard: bool = False
    """With several processes: each keeps a part of the frozen blocks while it trains (FSDP2), which makes room for
    activations. Labelling and evaluation need the whole model on one device all the same."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Trackers that also get what `metrics.jsonl` holds. They stay on this machine, in the run folder's `tracking/`, unless
    their own variables say otherwise (`WANDB_MODE`, `MLFLOW_TRACKING_URI`). Each needs its package."""
    seed: int = 0
    """Seed of everything that is drawn: initialisation, order, dropout, sampling, bootstrap."""


class EvalSection(DataSection):
    """Held-out rows, never trained on. Unset `data`: they are split off from the queries, and read as `[queries]` says."""

    split: str = "test"
    """Split of a hub data set."""
    share: Share = 0.15
    """Without `data`: share of the queries that is held out."""
    metrics: list[str] = []
    """Any of `pass_at_1` (the answer is a program that passes the row's tests; needs `code.run`), `exact_match`, `format`,
    `field_accuracy`, `label_accuracy`, `macro_f1`; `squad_exact`, `squad_f1` and `squad_contains` (the answer stands
    somewhere in what was written), which compare words without case, punctuation (`$`, `+` and `<` among it) and articles,
    but with these where the answer is nothing else, such as the choice `A`; of a row's `answers` (a list), if it has several,
    the best counts; or your own `module:function` that takes (prediction, answer, row) and returns a number, or None where it
    cannot judge, which needs `ctxdistill --allow-code`. Empty: all of the first six that the data allows."""
    group: str | None = None
    """A column of the held-out rows by whose values the results are shown, too."""
    format: str | None = None
    """A regular expression that a well-formed answer matches as a whole. Its named groups are the fields of `field_accuracy`."""
    max_new_tokens: Positive = 128
    """Longest answer that is generated."""
    latency_rows: NotNegative = 8
    """Rows on which the time of a single request is measured, one at a time; 0 skips it."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples behind each 95 % interval."""


class CodeSection(Section):
    """Programs that the model writes, run against the tests of their rows for the metric `pass_at_1`. See howto-code.md."""

    run: bool = False
    """Run what the model wrote, in a sandbox (what that protects from, and what not, is in howto-code.md). Off unless you say so."""
    tests: str = "tests"
    """Column of the held-out rows with the tests: a text or a list of texts, such as `assert f(1) == 2`."""
    setup: str | None = None
    """Column with code that program and tests are both given first, such as imports."""
    seconds: AboveZero = 10.0
    """Time for all tests of a program together."""
    memory_mb: Annotated[int, Field(ge=64)] = 512
    """Memory of a program."""


class BehaviourSection(Section):
    """What else the adapter does, measured after training: on unrelated prompts, turned up and down, prompted again."""

    unrelated: Annotated[int, Field(ge=0, le=24)] = 16
    """Everyday prompts that have nothing to do with the context, on which the KL to the base model is measured; 0 skips it."""
    rows: NotNegative = 0
    """Held-out rows on which the adapter's strength is varied, and which are asked behind the context (not where
    `completions.extract` takes the answer out of the teacher's thoughts) and behind another system prompt; 0 skips these checks."""
    strengths: list[AtLeastZero] = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    """Strengths that are tried: 0 is the base model, 1 the adapter as trained."""
    contexts: str | None = None
    """Where rows have contexts of their own (`context.column`), a column that names them: gives the cross-talk matrix, rows
    of one context measured against the teachers of all."""
    other_system: str = "Answer every message with one short sentence in capital letters."
    """A system prompt that asks for something else than the context does. Empty: not tried."""


class GateSection(Section):
    """Is there anything to teach? Runs before training."""

    on_fail: Literal["stop", "warn"] = "stop"
    """`warn` goes on all the same."""
    min_kl: AtLeastZero = 0.02
    """Smallest mean KL(teacher || base) in nats per token that is worth teaching."""
    min_gain: float = 0.0
    """The teacher's gain over zero-shot in the main metric must be above this, by its 95 % interval."""


class CostSection(Section):
    """Prices for the break-even point. Without them it is stated in time and tokens on this machine."""

    per_million_tokens: AtLeastZero = 0.0
    """What a million prompt tokens cost, in the currency of your choice."""
    machine_hour: AtLeastZero = 0.0
    """What an hour of the machine that distils costs, in the same currency."""
    requests_per_day: AtLeastZero = 0.0
    """Expected traffic; gives the break-even point in days."""


class Recipe(Section):
    """Everything that a run depends on."""

    name: FolderName = ""
    """A name for tables, the adapter card and the run folder in `runs/`: no path. Empty: the recipe's file name."""
    model: ModelSection
    context: ContextSection = ContextSection()
    prompt: PromptSection = PromptSection()
    queries: QueriesSection
    synthesis: SynthesisSection = SynthesisSection()
    completions: CompletionsSection = CompletionsSection()
    targets: TargetsSection = TargetsSection()
    teacher: TeacherSection = TeacherSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    code: CodeSection = CodeSection()
    behaviour: BehaviourSection = BehaviourSection()
    gate: GateSection = GateSection()
    cost: CostSection = CostSection()
    base_dir: Path = Field(default=Path("."), exclude=True)
    # where relative paths start: the recipe's folder; not a key of the file
    _typed: str = "RECIPE"

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read `path` (a `.toml` recipe) and apply `section.key=value` overrides.

        Raises: `RecipeError` that lists every problem at once.
        """
        raw = read_toml(path, overrides, start="write one to start from with: ctxdistill init my-recipe.toml")
        if {"grid", "tasks"} & raw.keys():
            raise RecipeError(f"{path} is a study and not a recipe", fix=f"ctxdistill study {shlex.quote(str(path))}")
        recipe = cls.from_dict(raw, base_dir=Path(path).resolve().parent)
        recipe._typed = shlex.join([str(path), *overrides])
        return recipe

    @classmethod
    def from_dict(cls, raw: dict[str, Any], base_dir: str | Path = ".") -> Recipe:
        """A recipe from nested dicts, as TOML gives them. Relative paths start at `base_dir`."""
        if "base_dir" in raw:
            raise several(RecipeError, "recipe", ["base_dir: not a key of a recipe; it is the recipe's folder"])
        try:
            return cls.model_validate({**raw, "base_dir": Path(base_dir)})
        except ValidationError as error:
            raise several(
                RecipeError,
                "recipe",
                [line for e in error.errors() for line in problem_of(dict(e)).split("\n")],
                fix=COMPARE,
            ) from None

    @property
    def typed(self) -> str:
        """The recipe's file and overrides as a command line names them; `RECIPE` where it comes from no file."""
        return self._typed

    def to_dict(self) -> dict[str, Any]:
        """All values, defaults included, as JSON can hold them."""
        return self.model_dump(mode="json")

    def path(self, name: str) -> Path:
        """`name` as a path, relative to the recipe's folder."""
        try:
            return (self.base_dir / Path(name).expanduser()).resolve()
        except (RuntimeError, ValueError, OSError) as error:
            raise RecipeError(f"{name!r} is not a path: {error}", expected="a file or folder") from None

    def written(self) -> dict[str, Path]:
        """What is written beside the run folder, by its key."""
        names = {"targets.dir": self.targets.dir, "synthesis.file": self.synthesis.file}
        return {key: self.path(name) for key, name in names.items() if name}

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        """Contradictions between sections; all of them are collected and reported in one message."""
        problems = [*self._context(), *self._prompt(), *self._written(), *self._training(), *self._evaluation()]
        if written := self.written():
            problems += outside(written, self.base_dir, Path.cwd())
        problems += self._engine()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _context(self) -> list[str]:
        c, p, problems = self.context, self.prompt, list[str]()
        kinds = {
            "system": c.system, "system_file": c.system_file, "documents": c.documents, "messages": c.messages,
            "demos": c.demos, "column": c.column, "teacher_prompt": c.teacher_prompt,
        }  # fmt: skip
        given = [name for name, value in kinds.items() if value]
        text_context = p.style == "text" and p.instruction
        if not given and not text_context:
            problems.append(
                "context: there is no context; expected at least one of system, system_file, documents, messages, demos, "
                "column, teacher_prompt"
            )
        if c.system is not None and c.system_file is not None:
            problems.append("context: system and system_file are both given; keep one")
        if c.teacher_prompt and len(given) > 1:
            problems.append(f"context.teacher_prompt excludes the other kinds, found {', '.join(given)}; keep one")
        if c.student_demos and not c.demos:
            problems.append("context.student_demos needs context.demos")
        if c.demos_limit and c.student_demos > c.demos_limit:
            problems.append(
                f"context.student_demos = {c.student_demos} is more than context.demos_limit = {c.demos_limit}"
            )
        if c.chunk_tokens and not c.documents:
            problems.append("context.chunk_tokens splits context.documents, and there are none")
        if c.chunk_tokens and c.chunk_tokens < 32:
            problems.append(f"context.chunk_tokens: expected 0 or at least 32, found {c.chunk_tokens}")
        if c.chunk_tokens and 2 * c.chunk_overlap > c.chunk_tokens:
            problems.append(
                f"context.chunk_overlap: expected at most half of context.chunk_tokens = {c.chunk_tokens}, found {c.chunk_overlap}"
            )
        return problems

    def _written(self) -> list[str]:
        q, s, problems = self.queries, self.synthesis, list[str]()
        if not q.synthesize:
            changed = [key for key in type(s).model_fields if getattr(s, key) != getattr(SynthesisSection(), key)]
            return [f"synthesis.{key} has no effect without queries.synthesize" for key in changed[:1]]
        own = [f"context.{key}" for key in ("column", "teacher_prompt") if getattr(self.context, key)]
        other = [*own, *(["queries.messages"] if q.messages else [])]
        if self.completions.source == "data":
            other.append('completions.source = "data"')
        with contextlib.suppress(ValueError):  # a broken pattern is another problem
            if not fields_of(self.prompt.pattern) <= {"prompt", q.prompt}:
                other.append(f"prompt.pattern = {self.prompt.pattern!r}")
        if other:
            problems.append(
                f"queries.synthesize writes one text per row and no answer, so it excludes {', '.join(other)}"
            )
        return problems + server_problems("synthesis", s.endpoint, s.endpoint_model, s.key_variable)

    def _engine(self) -> list[str]:
        t = self.teacher
        default = TeacherSection(engine=t.engine)
        used = {
            "local": set(),
            "vllm": {"at_once", "tolerance", "memory"},
            "server": set(type(t).model_fields) - {"memory"},
        }
        problems = [
            f'teacher.{key} has no effect with teacher.engine = "{t.engine}"'
            for key in type(t).model_fields
            if key not in used[t.engine] and getattr(t, key) != getattr(default, key)
        ]
        if t.engine == "local":
            return problems
        if t.engine == "server" and not (t.endpoint or t.endpoint_model):
            problems.append('teacher.engine = "server" needs teacher.endpoint and teacher.endpoint_model')
        if self.targets.kind != "topk":
            problems.append(f'teacher.engine = "{t.engine}" tells the likeliest tokens: it needs targets.kind = "topk"')
        if self.completions.source == "label":
            problems.append(
                f'teacher.engine = "{t.engine}" does not choose labels: completions.source = "teacher" or "data"'
            )
        if self.completions.extract:
            problems.append(
                f'completions.extract asks the teacher twice about a row, which teacher.engine = "{t.engine}" does not do'
            )
        return problems + server_problems("teacher", t.endpoint, t.endpoint_model, t.key_variable)

    def _prompt(self) -> list[str]:
        c, p, problems = self.context, self.prompt, list[str]()
        ignored = {
            "chat": ("instruction", "student_instruction", "separator", "stop"),
            "text": ("template_kwargs", "teacher_template_kwargs", "student_template_kwargs"),
        }
        if lost := [key for key in ignored[p.style] if getattr(p, key) != type(p).model_fields[key].default]:
            other = "text" if p.style == "chat" else "chat"
            problems.append(f'prompt.{lost[0]} has no effect with prompt.style = "{p.style}"; it belongs to "{other}"')
        if p.style == "text" and not (p.separator or p.stop):
            problems.append("prompt.separator is empty: give prompt.stop, the text at which an answer ends")
        if p.style == "text" and (self.queries.messages or self.eval.messages):
            problems.append(
                'prompt.style = "text" has no roles: queries.messages and eval.messages need prompt.style = "chat"'
            )
        for name, section in (("queries", self.queries), ("eval", self.eval)):
            if section.taught == "every" and section.turns == "query":
                problems.append(
                    f'{name}.taught = "every" needs {name}.messages that hold answers: {name}.turns = "answered" or "conversation"'
                )
        if p.style == "text" and (c.messages or c.system or c.system_file or c.student_system is not None):
            problems.append(
                'prompt.style = "text" has no roles: system and messages cannot be rendered; use prompt.instruction and '
                'context.documents, or prompt.style = "chat"'
            )
        problems += [
            f"{name}.turns has no effect without {name}.messages"
            for name, part in (("queries", self.queries), ("eval", self.eval))
            if part.turns != "query" and not part.messages
        ]
        if not all(word.strip() for word in p.label_words):
            problems.append("prompt.label_words: an empty word")
        if len(set(p.label_words)) != len(p.label_words) or (p.label_words and len(p.label_words) < 2):
            problems.append(f"prompt.label_words: expected two or more different words, found {p.label_words}")
        for key, pattern, needs in (("pattern", p.pattern, None), ("answer_pattern", p.answer_pattern, "answer")):
            try:
                names = fields_of(pattern)
            except ValueError as error:
                problems.append(f"prompt.{key}: {error}; write {{{{ and }}}} for literal braces")
                continue
            if needs and names != {needs}:
                problems.append(f"prompt.{key} must have {{{needs}}} as its one field, found {pattern!r}")
            if key == "pattern":
                problems += self._told(names)
            if not names:
                problems.append(f"prompt.{key} has no field, so that all rows would be the same; found {pattern!r}")
        return problems

    def _told(self, names: set[str]) -> list[str]:
        """Fields of `prompt.pattern` that would tell the model the answer: `{answer}` is it, whatever its column is called."""
        parts = {"queries": self.queries, "eval": self.eval}
        answers = {"answer", *(part.answer for part in parts.values())}
        problems = [
            f"prompt.pattern holds the answer column {{{name}}}: the model would be told the answer"
            for name in sorted((names - {"prompt"}) & answers)
        ]
        return problems + [
            f"{key}.prompt and {key}.answer are both {part.answer!r}: the model would be told the answer"
            for key, part in parts.items()
            if "prompt" in names and part.prompt == part.answer and not part.messages
        ]

    def _training(self) -> list[str]:
        p, problems = self.prompt, list[str]()
        if self.queries.data is None and not self.queries.synthesize:
            problems.append("queries.data: missing; expected a data file or hub:owner/name (or queries.synthesize)")
        if self.completions.source == "label" and not p.label_words:
            problems.append('completions.source = "label" needs prompt.label_words')
        if self.completions.samples > 1 and self.completions.temperature == 0:
            problems.append(
                "completions.samples above 1 needs completions.temperature above 0; greedy samples are all the same"
            )
        if self.completions.samples > 1 and self.completions.source != "teacher":
            problems.append('completions.samples above 1 needs completions.source = "teacher"')
        if self.targets.kind == "topk" and self.train.temperature != 1:
            problems.append(
                'targets.kind = "topk" works at train.temperature = 1 only: the tail is one number and cannot be softened; '
                'use targets.kind = "hidden"'
            )
        if self.train.on_policy and self.completions.source == "label":
            problems.append(
                'train.on_policy has no effect on one label; it needs completions.source = "teacher" or "data"'
            )
        if self.train.on_policy and self.train.ce_weight:
            problems.append(
                "train.ce_weight would teach the student its own completions where train.on_policy is above 0; drop one"
            )
        if self.train.on_policy and self.completions.extract and self.completions.teach == "answer":
            problems.append(
                "train.on_policy: the teacher would judge the student's bare answers without the thoughts that "
                'completions.extract leaves out; use completions.teach = "all" or train.on_policy = 0'
            )
        if self.train.on_policy and self.train.shard:
            problems.append(
                "train.shard: completions of the student's (train.on_policy) are written by the first process alone, which "
                "then holds only a part of the weights; drop one"
            )
        off = not self.train.on_policy and "on_policy" not in self.train.model_fields_set  # else it was switched off
        if off and (self.train.on_policy_ramp or self.train.round_steps):
            problems.append("train.on_policy_ramp and train.round_steps need train.on_policy above 0")
        if not self.completions.supervise_end and self.train.on_policy:
            problems.append(
                "completions.supervise_end = false needs train.on_policy = 0: the student's end is supervised"
            )
        problems += self._thoughts()
        if not self.completions.supervise_end and self.completions.source == "teacher":
            problems.append('completions.supervise_end = false needs completions.source = "data" or "label"')
        return problems

    def _thoughts(self) -> list[str]:
        c, problems = self.completions, list[str]()
        if c.source != "teacher" and (c.scratchpad or c.extract):
            problems.append('completions.scratchpad and extract need completions.source = "teacher"')
        if (c.scratchpad or c.extract) and (self.prompt.style == "text" or self.prompt.label_words):
            problems.append('completions.scratchpad and extract need prompt.style = "chat" and no prompt.label_words')
        if c.scratchpad and self.context.teacher_prompt:
            problems.append(
                "completions.scratchpad: put it into context.teacher_prompt, which is the teacher's whole prompt"
            )
        if c.extract is not None:
            try:
                groups = re.compile(c.extract).groups
                problems += [] if groups == 1 else [f"completions.extract: expected one group (...), found {groups}"]
            except re.error as error:
                problems.append(f"completions.extract is not a regular expression: {error}")
        if c.checker is not None and not re.fullmatch(r"[\w.]+:\w+", c.checker):
            problems.append(f"completions.checker: expected module:function, found {c.checker!r}")
        return problems

    def _held_out(self) -> list[str]:
        e = self.eval
        given = [key for key in DataSection.model_fields if key in e.model_fields_set]
        if "data" in given:  # and is None: a dump of all keys, since a file cannot say so
            given = [key for key in given if getattr(e, key) != EvalSection.model_fields[key].default]
        if e.data is not None or not given:
            return []
        return [
            f"{', '.join(f'eval.{key}' for key in given)}: no effect without eval.data; "
            "held-out rows are then queries, and read as [queries] says"
        ]

    def _evaluation(self) -> list[str]:
        problems = self._held_out()
        if self.behaviour.contexts and not self.context.column:
            problems.append("behaviour.contexts needs context.column: it names the contexts that the rows have")
        if self.eval.format is not None:
            try:
                re.compile(self.eval.format)
            except re.error as error:
                problems.append(f"eval.format is not a regular expression: {error}")
        known = {
            "exact_match",
            "format",
            "field_accuracy",
            "label_accuracy",
            "macro_f1",
            "pass_at_1",
            "squad_contains",
            "squad_exact",
            "squad_f1",
        }
        for metric in self.eval.metrics:
            if metric not in known and not re.fullmatch(r"[\w.]+:\w+", metric):
                problems.append(
                    f"eval.metrics: unknown metric {metric!r}{nearest(metric, known)}; or give module:function"
                )
        return problems


def server_problems(section: str, endpoint: str | None, model: str | None, key_variable: str | None) -> list[str]:
    """What is wrong with how a `section` names a server."""
    problems = list[str]()
    if bool(endpoint) != bool(model):
        problems.append(f"{section}.endpoint and {section}.endpoint_model belong together; one is missing")
    if endpoint and not re.fullmatch(r"https?://[^/\s@?#]+(/[^\s?#]*)?", endpoint):
        problems.append(
            f"{section}.endpoint: expected http(s)://host/path without user name and query, found {endpoint!r}"
        )
    if key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key_variable):
        problems.append(f"{section}.key_variable: expected the name of an environment variable, not a key")
    return problems


def fields_of(pattern: str) -> set[str]:
    """Names of the `{column}` fields of a pattern. Raises ValueError for unbalanced braces and for anything but names."""
    names = set()
    for _, name, spec, conversion in string.Formatter().parse(pattern):
        if name is None:
            continue
        if not re.fullmatch(r"\w+", name) or spec or conversion:
            raise ValueError(f"{{{name}}} is not a plain column name in {pattern!r}")
        names.add(name)
    return names


def read_toml(path: str | Path, overrides: Sequence[str], *, start: str, what: str = "recipe") -> dict[str, Any]:
    """The tables of a TOML file with `overrides` put in, and `name` from the file where it has none.

    Raises: `RecipeError`; `what` is the word for such a file, `start` says how to get one where there is none.
    """
    path = Path(path)
    if path.is_dir():
        raise RecipeError(f"{path} is a folder", expected=f"a {what} file (.toml)", fix=f"name the {what} itself")
    try:
        text = files.read_text(path, files.MAX_RECIPE)
    except FileNotFoundError:
        raise RecipeError(f"no {what} at {path}", expected="a TOML file", fix=start) from None
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error}", expected="a readable UTF-8 text file") from None
    except ValueError as error:
        raise RecipeError(
            f"cannot read {path}: {error}", expected="a UTF-8 text file", fix="save it as UTF-8"
        ) from None
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number that is too long is a plain ValueError
        raise RecipeError(f"{path} is not valid TOML: {error}", fix=f"strings need quotes; {COMPARE}") from None
    apply_overrides(raw, overrides)
    raw.setdefault("name", path.stem)
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put each `section.key=value` into `raw`. The value is read as TOML, and as a plain string where that fails."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise RecipeError(
                f"cannot read the override {override!r}", expected="section.key=value", fix="for example: train.lr=1e-4"
            )
        try:
            (value,) = tomllib.loads(f"value = {text}").values()  # one value; a second line would be another key
        except ValueError:
            value = text
        *sections, last = key.split(".")
        table = raw
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise RecipeError(f"{override!r}: {section} is a value, not a section", expected="section.key=value")
        table[last] = value


def section_of(path: Sequence[str | int], root: type[BaseModel] | None = None) -> type[BaseModel]:
    """The class that declares the keys at `path` inside `root` (a recipe)."""
    cls: type[BaseModel] = root or Recipe
    for name in path:
        field = cls.model_fields.get(str(name))
        annotation = field.annotation if field else None
        if get_origin(annotation) is not None:
            annotation = next((a for a in get_args(annotation) if isinstance(a, type)), None)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        cls = annotation
    return cls


def nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _about(path: Sequence[str | int], root: type[BaseModel]) -> str:
    """The documentation of the key at `path`, or of the one that holds it; empty where there is none."""
    about = ""
    for name in path:
        field = root.model_fields.get(str(name))
        if field is None:
            break
        about, root = field.description or "", section_of([name], root)
    return " ".join(about.split())


def problem_of(error: dict[str, Any], root: type[BaseModel] | None = None) -> str:
    """One line for one of pydantic's errors about a `root` (a recipe)."""
    *parents, last = error["loc"] or ("",)
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = set(section_of(parents, root).model_fields) - {"base_dir"}
        return f"{where}: unknown key{nearest(str(last), known)}"
    if error["type"] == "missing":
        return f"{where}: missing, and there is no default"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    about = _about(error["loc"], root or Recipe)
    found = json.dumps(error["input"], default=str)[:80]
    return f"{where}: {message[0].lower()}{message[1:]}, found {found}{about and f'; what it is: {about}'}"
