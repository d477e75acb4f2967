"""What training did to everything else: perplexity on unrelated text, instructions that a program can check, and programs
that pass their tests.

In: a model with its adapter on or off, texts and prompts that have nothing to do with the task. Out: a perplexity, and
the share of prompts that were followed. Invariants: the same texts, prompts and decoding for every arm; nothing is
drawn; a prompt counts only when all of its instructions can be checked here, and the others are counted.

The instructions are those of IFEval ("Instruction-Following Evaluation for Large Language Models", arXiv 2311.07911,
table of verifiable instructions), checked as they are worded there. Sentences are split at `.`, `!` and `?` and words
are runs of letters and digits, so counts can differ by a few from those of a linguistic tokeniser; the language of an
answer is not checked.
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctxdistill import programs, sandbox
from ctxdistill.errors import DataError, several
from ctxdistill.lm import LM, check_fit
from ctxdistill.readers import READERS, Record, read_hub
from ctxdistill.recipe import CodeSection

MBPP_TEST = range(11, 511)
"""Numbers of the problems in MBPP's test set."""
BATCH = 8
"""Rows in one forward or one generation."""


@dataclass(frozen=True)
class Format:
    """A prompt whose instructions a program can check."""

    id: str
    prompt: str
    checks: tuple[Callable[[str], bool], ...]

    def obeyed(self, answer: str) -> bool:
        """Whether the answer follows all instructions; one that says nothing follows none."""
        return bool(answer.strip()) and all(check(answer) for check in self.checks)


# -- data -------------------------------------------------------------------------------------------------------------


def texts(root: Path | None, rows: int) -> list[str]:
    """The first `rows` (0: all) questions of GSM8K's test set with their worked answers.

    From `root`/gsm8k/test.jsonl, or without a root from `openai/gsm8k` on the hub. Raises: `DataError`.
    """
    found = _read(root, "gsm8k/test.jsonl", ("openai/gsm8k", "main", "test"), ("question", "answer"), rows)
    return [f"{fields['question']}\n{fields['answer']}" for _, fields in found]


def formats(root: Path | None, rows: int, *, max_new_tokens: int = 96) -> tuple[list[Format], int]:
    """The first `rows` (0: all) prompts of IFEval that can be checked, and how many were passed over on the way.

    Passed over is a prompt with an instruction of a kind that is not supported, or that asks for more words than the
    answer may have tokens.

    From `root`/ifeval/input_data.jsonl, or without a root from `google/IFEval` on the hub. Raises: `DataError`.
    """
    columns = ("key", "prompt", "instruction_id_list", "kwargs")
    found: list[Format] = []
    problems: list[str] = []
    left_out = 0
    for origin, fields in _read(root, "ifeval/input_data.jsonl", ("google/IFEval", None, "train"), columns, 0):
        if rows and len(found) == rows:
            break
        try:
            prompt = _format(fields, max_new_tokens)
        except (TypeError, KeyError, ValueError, AttributeError) as error:  # whatever a check makes of wrong arguments
            problems.append(f"{origin}: {type(error).__name__}: {error}")
            continue
        if prompt:
            found.append(prompt)
        else:
            left_out += 1
    if problems:
        raise several(DataError, "IFEval prompts whose instructions cannot be read", problems, fix=_PUBLISHED)
    return found, left_out


def problems(root: Path | None, rows: int) -> list[Format]:
    """The first `rows` (0: all) problems of MBPP's test set, each with one check: its tests pass (in the sandbox).

    From `root`/mbpp/sanitized-mbpp.json, or without a root from `google-research-datasets/mbpp` on the hub. Raises:
    `DataError`; `RunError` where programs cannot be run in the sandbox of this system.
    """
    section = CodeSection(run=True, tests="test_list", setup="test_imports")
    sandbox.isolation()

    def passes(answer: str, fields: Mapping[str, Any]) -> bool:
        return programs.pass_at_1(answer, fields, section) == 1.0

    hub = ("google-research-datasets/mbpp", "sanitized", "test")
    found = _read(root, "mbpp/sanitized-mbpp.json", hub, ("task_id", "prompt", "test_list"), 0)
    made = []
    for _, fields in found:
        tests, _ = programs.tests_of(fields, section)
        if fields["task_id"] in MBPP_TEST and tests:
            text = f"{fields['prompt']} Your code should pass these tests:\n{chr(10).join(tests)}"
            made.append(Format(str(fields["task_id"]), text, (functools.partial(passes, fields=fields),)))
    return made[: rows or None]


def _format(fields: Mapping[str, Any], max_new_tokens: int) -> Format | None:
    """None where an instruction is not supported or cannot be followed in so many tokens."""
    checks = []
    for kind, arguments in zip(fields["instruction_id_list"], fields["kwargs"], strict=True):
        # On the hub each row has the arguments of all kinds, null where they do not apply.
        given = {name: value for name, value in arguments.items() if value is not None}
        too_long = given.get("relation") == "at least" and given.get("num_words", 0) > max_new_tokens
        if kind not in KINDS or too_long:
            return None
        check = functools.partial(KINDS[kind], **given)
        check("An answer.")  # finds missing, surplus and wrong arguments here
        checks.append(check)
    return Format(str(fields["key"]), fields["prompt"], tuple(checks))


_PUBLISHED = "use the published file"


def _read(
    root: Path | None, local: str, hub: tuple[str, str | None, str], columns: tuple[str, ...], most: int
) -> Sequence[Record]:
    """The first `most` records (0: all), each with a value in every column."""
    problems: list[str] = []
    if root is None:
        fix = f"check the network, set tasks.root to a folder with {local}, or switch the retention check off"
        source, records, _ = read_hub(*hub, most, what="retention", fix=fix)
    else:
        path = root / local
        if not path.is_file():
            raise DataError(
                f"retention: there is no file {path}",
                expected=f"{local} below tasks.root",
                fix="put the file there, leave tasks.root out to load it from the hub, or switch the retention check off",
            )
        source = str(path)
        records, _ = READERS[path.suffix](path, most, problems)
    for origin, fields in records:
        if missing := [column for column in columns if fields.get(column) is None]:
            problems.append(f"{origin}: no {' and no '.join(missing)}")
    if problems or not records:
        raise several(DataError, f"retention: {source}", problems or ["it is empty"], fix=_PUBLISHED)
    return records


# -- measures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(lm: LM, texts: Sequence[str], *, tokens: int = 256) -> float:
    """exp of the mean negative log-probability per token over all texts, with adapter and weights as they are now.

    Each text is read up to its first `tokens` tokens (or the model's window); its first token is predicted by nothing
    and not scored, unless the tokenizer puts a BOS before it.
    """
    limit = min(tokens, lm.window)
    rows = [ids for text in texts if len(ids := list(lm.tokenizer(text)["input_ids"])[:limit]) > 1]
    if not rows:
        raise DataError("no text to take the perplexity of", expected="at least one text of two tokens or more")
    total = 0.0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        with _language_head(lm):
            for ids, hidden in zip(batch, lm.hidden([(ids, len(ids) - 1) for ids in batch]), strict=True):
                wanted = torch.tensor(ids[1:], device=lm.device)  # [T]
                total += float(torch.nn.functional.cross_entropy(lm.head(hidden), wanted, reduction="sum"))
    mean = total / sum(len(ids) - 1 for ids in rows)
    return float(torch.tensor(mean, dtype=torch.float64).exp())  # infinite rather than an overflow


def format_following(
    lm: LM,
    prompts: Sequence[Format],
    *,
    max_new_tokens: int = 96,
    template_kwargs: Mapping[str, Any] | None = None,
) -> float | None:
    """Share of prompts whose greedy answer follows all their instructions, with adapter and weights as they are now.

    The prompt is one user message in the chat template, without a system prompt of ours. An answer that is not finished
    after `max_new_tokens` is judged as far as it goes, which `lm.notes` says. None for a model without a chat template
    (the reason goes to `lm.notes`), and where there are no prompts. Raises: `FitError`.
    """
    if not lm.tokenizer.chat_template:
        _note(lm, "format-following was not measured: the model has no chat template")
        return None
    if not prompts:
        return None
    asked = [
        list(
            lm.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.prompt}],
                add_generation_prompt=True,
                return_dict=False,
                **(template_kwargs or {}),
            )
        )
        for prompt in prompts
    ]
    lengths = [(prompt.id, len(ids) + max_new_tokens) for prompt, ids in zip(prompts, asked, strict=True)]
    fix = "set retention.formats and retention.programs to 0, or take a model with a larger window"
    check_fit(lengths, lm.window, "a prompt of the retention check", fix)
    followed = 0
    for start in range(0, len(prompts), BATCH):
        with _language_head(lm):
            written = lm.generate(asked[start : start + BATCH], max_new_tokens=max_new_tokens)
        for prompt, ids in zip(prompts[start : start + BATCH], written, strict=True):
            if ids[-1] not in lm.stop_ids:
                _note(lm, f"format-following judges answers by their first {max_new_tokens} tokens; some were longer")
            followed += prompt.obeyed(lm.tokenizer.decode(ids, skip_special_tokens=True))
    return followed / len(prompts)


@contextlib.contextmanager
def _language_head(lm: LM) -> Iterator[None]:
    """A classification head has no words: what the blocks still know is asked through the vocabulary's head."""
    classes, lm.classes = lm.classes, None
    try:
        yield
    finally:
        lm.classes = classes


def _note(lm: LM, text: str) -> None:
    if text not in lm.notes:
        lm.notes.append(text)


# -- kinds of instructions --------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[..., bool]] = {}
"""IFEval's name of a kind -> check of an answer, with the arguments that the data set gives it (spelt as there)."""

Check = Callable[..., bool]


def _kind(name: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        KINDS[name] = check
        return check

    return register


def _compare(count: int, relation: str, number: int) -> bool:
    return bool({"at least": operator.ge, "less than": operator.lt}[relation](count, number))


def _parts(answer: str, divider: str) -> list[str]:
    """What lies between dividers, blank parts left out."""
    return [part.strip() for part in re.split(divider, answer) if part.strip()]


@_kind("keywords:existence")
def _existence(answer: str, keywords: Sequence[str]) -> bool:
    return all(word.casefold() in answer.casefold() for word in keywords)


@_kind("keywords:forbidden_words")
def _forbidden(answer: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in forbidden_words)


@_kind("keywords:frequency")
def _frequency(answer: str, keyword: str, relation: str, frequency: int) -> bool:
    return _compare(answer.casefold().count(keyword.casefold()), relation, frequency)


@_kind("keywords:letter_frequency")
def _letters(answer: str, letter: str, let_relation: str, let_frequency: int) -> bool:
    return _compare(answer.casefold().count(letter.casefold()), let_relation, let_frequency)


@_kind("length_constraints:number_words")
def _words(answer: str, relation: str, num_words: int) -> bool:
    return _compare(len(re.findall(r"\w+", answer)), relation, num_words)


@_kind("length_constraints:number_sentences")
def _sentences(answer: str, relation: str, num_sentences: int) -> bool:
    parts = re.split(r"[.!?]+[\"')\]]*(?:\s+|$)", answer)
    return _compare(sum(bool(re.search(r"\w", part)) for part in parts), relation, num_sentences)


@_kind("length_constraints:number_paragraphs")
def _paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Divided by `***`."""
    return len(_parts(answer, r"\*{3}")) == num_paragraphs


@_kind("length_constraints:nth_paragraph_first_word")
def _first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Divided by empty lines; the word without what punctuation is around it."""
    parts = _parts(answer, r"\n\s*\n")
    if len(parts) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    return re.sub(r"^\W+|\W+$", "", parts[nth_paragraph - 1].split()[0]).casefold() == first_word.casefold()


@_kind("punctuation:no_comma")
def _no_comma(answer: str) -> bool:
    return "," not in answer


@_kind("change_case:english_capital")
def _capital(answer: str) -> bool:
    return answer.isupper()


@_kind("change_case:english_lowercase")
def _lowercase(answer: str) -> bool:
    return answer.islower()


@_kind("change_case:capital_word_frequency")
def _capital_words(answer: str, capital_relation: str, capital_frequency: int) -> bool:
    words = re.findall(r"\w[\w'’-]*", answer)
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


@_kind("startend:quotation")
def _quotation(answer: str) -> bool:
    return len(answer.strip()) > 1 and answer.strip()[0] == answer.strip()[-1] == '"'


@_kind("startend:end_checker")
def _end(answer: str, end_phrase: str) -> bool:
    """Quotation marks around the whole answer may follow the phrase: another instruction can ask for them."""
    return answer.strip().strip('"').rstrip().casefold().endswith(end_phrase.strip().casefold())


@_kind("detectable_format:title")
def _title(answer: str) -> bool:
    return bool(re.search(r"<<[^<>\n]*\w[^<>\n]*>>", answer))


@_kind("detectable_format:json_format")
def _json(answer: str) -> bool:
    """An object or a list, in a fenced block or not."""
    try:
        value = json.loads(re.sub(r"^```\w*\n|```$", "", answer.strip()))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list)


@_kind("detectable_format:number_bullet_lists")
def _bullets(answer: str, num_bullets: int) -> bool:
    return len(re.findall(r"^[ \t]*[*-][ \t]+\S", answer, re.MULTILINE)) == num_bullets


@_kind("detectable_format:number_highlighted_sections")
def _highlights(answer: str, num_highlights: int) -> bool:
    marked = re.findall(r"\*\*(?=\S)[^*\n]+(?<=\S)\*\*|\*(?=\S)[^*\n]+(?<=\S)\*", answer)
    return len(marked) >= num_highlights


@_kind("detectable_format:multiple_sections")
def _sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter)}\s?\d+", answer)) >= num_sections


@_kind("detectable_format:constrained_response")
def _constrained(answer: str) -> bool:
    return bool(re.search(r"My answer is (?:yes|no|maybe)\.", answer))


@_kind("detectable_content:postscript")
def _postscript(answer: str, postscript_marker: str) -> bool:
    letters = [re.escape(c) for c in postscript_marker if c.isalpha()]
    return bool(re.search(r"(?<![\w.])" + r"\.\s?".join(letters), answer, re.IGNORECASE))


@_kind("detectable_content:number_placeholders")
def _placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]+\]", answer)) >= num_placeholders


@_kind("combination:two_responses")
def _two(answer: str) -> bool:
    """Divided by six asterisks."""
    parts = _parts(answer, r"\*{6}")
    return len(parts) == 2 and parts[0] != parts[1]


@_kind("combination:repeat_prompt")
def _repeat(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().casefold().startswith(prompt_to_repeat.strip().casefold())
