"""A row becomes two token prompts: the teacher's, with the context, and the student's, without.

In: rows, the recipe's context and pattern, a tokenizer. Out: `Pair`s of token ids. Invariants: `join` is the only place
where prompt and completion ids are put together, so that both sides carry the same completion ids; text that was
rendered is never tokenised again; the student's prompt holds nothing of the context but what the recipe lets it keep;
what the chat template adds by itself is known and shown.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ctxdistill import rows as data
from ctxdistill.chunks import Chunk, Count, nearest_chunk, split_document
from ctxdistill.errors import DataError, ModelError, RecipeError
from ctxdistill.messages import Message, as_object, as_text, said, with_arguments
from ctxdistill.recipe import DataSection, Recipe, fields_of
from ctxdistill.rows import Row
from ctxdistill.rundir import fingerprint
from ctxdistill.spool import IdPairs, Lazy

AT_ONCE = 16
"""Rows whose prompts are tokenised together."""
Part = tuple[str, str]
"""(text, kind) with kind `context`, `query` or `template`."""


@dataclass(frozen=True)
class Pair:
    """One query as both sides see it."""

    id: str
    query: str
    """The query's text, for people."""
    answer: str | None
    """The reference answer, if the row has one."""
    teacher: tuple[int, ...]
    student: tuple[int, ...]
    origin: str
    fields: Mapping[str, Any]


def join(prompt: Sequence[int], completion: Sequence[int]) -> tuple[list[int], int]:
    """The model input for a prompt and the completion after it, and the number of supervised tokens at its end."""
    if not completion:
        raise RuntimeError("a completion has at least its end token")  # a bug, not the user's
    return [*prompt, *completion], len(completion)


@dataclass(frozen=True)
class Context:
    """What the teacher sees and the student does not, as read from the files that the recipe names."""

    system: str | None
    """The system text, documents included unless they are in chunks."""
    messages: tuple[Message, ...]
    demos: tuple[Row, ...]
    chunks: tuple[Chunk, ...] = ()
    """The documents in chunks, of which each row sees its own."""
    documents: Mapping[str, str] = field(default_factory=dict)
    """Name -> text."""

    @classmethod
    def read(cls, recipe: Recipe, count: Count) -> Context:
        """Raises `DataError` or `RecipeError` when a part cannot be read; `count` tells the number of tokens of a text."""
        c = recipe.context
        parts = [c.system] if c.system is not None else []
        if c.system_file:
            parts.append(data.read_text(c.system_file, recipe, "context.system_file").strip())
        base = [recipe.path(name).name for name in c.documents]
        documents = {
            own if base.count(own) == 1 else name: data.read_text(name, recipe, "context.documents").strip()
            for own, name in zip(base, c.documents, strict=True)
        }
        chunks: list[Chunk] = []
        if c.chunk_tokens:
            for name, text in documents.items():
                chunks += split_document(text, name, c.chunk_tokens, c.chunk_overlap, count)
        else:
            parts += [_headed(name, text) for name, text in documents.items()]
        messages = data.read_messages(c.messages, recipe, "context.messages") if c.messages else []
        messages = [with_arguments(m, as_object) for m in messages]
        demos: Sequence[Row] = ()
        if c.demos:
            section = recipe.queries.model_copy(
                update={"data": c.demos, "skip": 0, "limit": c.demos_limit, "messages": None}
            )
            demos = data.read(section, recipe, "context.demos", answers="required").rows
        system = "\n\n".join(parts) if parts else None
        return cls(system, tuple(messages), tuple(demos), tuple(chunks), documents)

    def with_chunk(self, chunk: Chunk) -> str:
        """The system text of a row that sees this chunk."""
        return "\n\n".join([*([self.system] if self.system else []), _headed(chunk.title, chunk.text)])


def _headed(title: str, text: str) -> str:
    return f"# {title}\n\n{text}"


class Prompter:
    """Renders rows for one recipe and tokenizer, with the context that the recipe names or the one given. Queries may be
    written in another way than the demonstrations, which then have a `demo_pattern` of their own.

    Raises (at construction): `ModelError` when the chat style meets a tokenizer without chat template, `DataError` for
    label words that cannot be told apart.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Any, context: Context | None = None, *, demo_pattern: str | None = None
    ) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.demo_pattern = demo_pattern or recipe.prompt.pattern
        self.context = Context.read(recipe, self.count) if context is None else context
        if recipe.prompt.style == "chat" and not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {recipe.model.name} has no chat template",
                expected='a chat model, since prompt.style is "chat"',
                found="a base model",
                fix='set prompt.style = "text", or use the instruction-tuned version of the model',
            )
        self.end = self._end()
        self._check_labels()

    # -- words to ids -------------------------------------------------------------------------------------------------

    def count(self, text: str) -> int:
        """Number of tokens of `text` alone."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of text, nothing added.

        In the text style an answer goes on in the middle of a line, where SentencePiece tokenizers do not put the space
        that they put at the start of a text; so it is tokenised after an anchor, which is then taken off.
        """

        def plain(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        if self.recipe.prompt.style == "text":
            anchor, both = plain(":"), plain(f":{text}")
            if both[: len(anchor)] == anchor:  # else they merge, and then there is no such space either
                return both[len(anchor) :]
        return plain(text)

    def _end(self) -> tuple[int, ...]:
        """The ids that end an answer: what the template writes after an assistant's turn, or the stop text."""
        if self.recipe.prompt.style == "text":
            return tuple(self.ids(self.stop_text))
        eos = self.tokenizer.eos_token_id
        # Gemma ends a turn with <end_of_turn> while its EOS is <eos>: take what the template writes after an answer.
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "xyzzy"}]
        tail = self._render(probe, False, teacher=False, tokenize=False).rsplit("xyzzy", 1)[-1].lstrip()
        special = {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        after = [i for token, i in sorted(special.items(), key=lambda pair: -len(pair[0])) if tail.startswith(token)]
        if not after and eos is None:
            raise ModelError(
                f"the tokenizer of {self.recipe.model.name} has no end-of-sequence token", fix="use another model"
            )
        return (after[0] if after else eos,)

    @property
    def stop_text(self) -> str:
        return self.recipe.prompt.stop or self.recipe.prompt.separator

    def ends(self, ids: list[int]) -> bool:
        """Whether an answer that was written so far is finished."""
        if ids[-1] == self.tokenizer.eos_token_id:
            return True
        if self.recipe.prompt.style == "chat":
            return ids[-1] in self.end
        return self.stop_text in self.tokenizer.decode(ids[-len(self.stop_text) - 4 :])

    def completion(self, answer: str) -> tuple[int, ...]:
        """Ids of a given answer, with its end."""
        text = self.recipe.prompt.answer_pattern.format(answer=answer)
        text = text.strip() if self.recipe.prompt.style == "chat" else text
        end = self.end if self.recipe.completions.supervise_end else ()
        return (*self.ids(text), *end)

    def text(self, ids: Sequence[int]) -> str:
        """The answer that completion ids spell, without its end."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        if self.recipe.prompt.style == "text":
            text = text.split(self.stop_text)[0]
        return text.strip()

    def answer(self, ids: Sequence[int]) -> str:
        """The answer in completion ids: what `completions.extract` finds in them, or all of their text."""
        pattern = self.recipe.completions.extract
        parts = self.split_answer(ids, re.compile(pattern, re.DOTALL)) if pattern else None
        return self.text(parts[1] if parts else ids)

    def split_answer(self, ids: Sequence[int], pattern: re.Pattern[str]) -> tuple[list[int], tuple[int, ...]] | None:
        """(the thoughts, the answer with its end) in what the teacher wrote: the group of the last match of `pattern`, as
        the teacher's own tokens; white space before it is part of the answer where it is part of its first token.

        Returns: None where there is no match, an empty one, or one that begins or ends inside a token.
        """

        def spelt(n: int) -> str:
            return str(self.tokenizer.decode(list(ids[:n]), skip_special_tokens=True))

        text = spelt(len(ids))
        found = list(pattern.finditer(text))
        if not found or not (found[-1][1] or "").strip():
            return None
        start, end = found[-1].span(1)
        start, end = end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())
        # A part of a character decodes to U+FFFD, which is as long as the character: no token that follows begins there.
        places = {n: len(part) for n in range(len(ids) + 1) if text.startswith(part := spelt(n))}
        first = max(n for n, place in places.items() if place <= start)
        last = min(n for n, place in places.items() if place >= end)
        if text[places[first] : start].strip() or text[end : places[last]].strip():
            return None
        return list(ids[:first]), (*ids[first:last], *self.end)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as text, special ones visible."""
        return [str(self.tokenizer.decode([i])) for i in ids]

    def reference(self, answer: str | None) -> str | None:
        """What a right answer reads like: the label word, or the answer as the pattern writes it."""
        if answer is None or self.recipe.prompt.label_words:
            return answer
        return self.recipe.prompt.answer_pattern.format(answer=answer).strip()

    @property
    def demo_section(self) -> DataSection:
        """How the demonstrations' rows are read: by the names of the queries' columns, without their messages."""
        return self.recipe.queries.model_copy(update={"messages": None})

    def _demo_query(self, row: Row) -> str:
        return self.demo_pattern.format_map(data.values(row, self.demo_section))

    def _demo_answer(self, row: Row) -> str:
        return self.recipe.prompt.answer_pattern.format(answer=data.values(row, self.demo_section)["answer"])

    @property
    def labels(self) -> dict[str, tuple[int, ...]]:
        """Ids of each label word."""
        return {word: self.completion(word) for word in self.recipe.prompt.label_words}

    def _check_labels(self) -> None:
        firsts: dict[int, list[str]] = {}
        for word, ids in self.labels.items():
            firsts.setdefault(ids[0], []).append(word)
        shared = [words for words in firsts.values() if len(words) > 1]
        if shared and self.recipe.prompt.shared_first_token == "error":
            raise DataError(
                f"label words share their first token: {'; '.join(' = '.join(words) for words in shared[:5])}",
                expected="label words that differ in the first token, so that one position tells them apart",
                found=f"{sum(map(len, shared))} of {len(self.labels)} words that do not",
                fix='choose other words (or add a leading space in prompt.answer_pattern), or set prompt.shared_first_token = "allow"',
            )

    @property
    def kept_demos(self) -> Sequence[Row]:
        """The demonstrations that stay in the student's prompt."""
        n = self.recipe.context.student_demos
        return self.context.demos[-n:] if n else ()

    # -- prompts ------------------------------------------------------------------------------------------------------

    def query_text(self, row: Row, section: DataSection) -> str:
        """The query as text, for people."""
        if section.messages:
            return "\n".join(said(m) for m in self._messages(row, section.messages))
        return self.recipe.prompt.pattern.format_map(data.values(row, section))

    def query_identity(self, row: Row, section: DataSection) -> str:
        """The query for comparing rows: its text and, unless that is all one user's turn, who says what and which tools are
        called with what. The ids of calls, which are drawn anew each time, are left out."""
        text = self.query_text(row, section)
        messages = self._messages(row, section.messages) if section.messages else []
        turns = [
            [m["role"], data.query_key(said(m)), [call.get("function", call) for call in m.get("tool_calls") or []]]
            for m in messages
        ]
        if turns in ([], [["user", data.query_key(text), []]]):
            return text
        return f"{text}\n{json.dumps(turns, ensure_ascii=False, sort_keys=True, default=str)}"

    def pair(self, row: Row, section: DataSection) -> Pair:
        """Both prompts of a row, as ids."""
        (teacher,), (student,) = (self._ids([row], section, teacher=side) for side in (True, False))
        return self._pair(row, section, teacher, student)

    def _pair(self, row: Row, section: DataSection, teacher: tuple[int, ...], student: tuple[int, ...]) -> Pair:
        answer, query = row.fields.get(section.answer), self.query_text(row, section)
        return Pair(row.id, query, None if answer is None else str(answer), teacher, student, row.origin, row.fields)

    def pairs(self, rows: Sequence[Row], section: DataSection) -> Sequence[Pair]:
        """Both prompts of all rows; the ids are in a file."""
        ids = IdPairs()
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            ids.extend(zip(*(self._ids(some, section, teacher=side) for side in (True, False)), strict=True))
        return Lazy(range(len(rows)), lambda i: self._pair(rows[i], section, *ids[i]))

    def request(self, row: Row, section: DataSection) -> list[Message] | str:
        """What a client sends to a server for the student to answer this row: messages, or in the text style the text."""
        if self.recipe.prompt.style == "text":
            return "".join(self._text(row, section, teacher=False))
        before, query = self._chat(row, section, teacher=False)
        return [with_arguments(m, as_text) for m in (*before, *query)]

    def pair_of_text(self, text: str) -> Pair:
        """Both prompts for a text that a user typed."""
        names = fields_of(self.recipe.prompt.pattern)
        if self.recipe.queries.messages is None and names != {"prompt"}:
            raise RecipeError(f"the pattern needs the columns {', '.join(sorted(names))}, not one text")
        if self.recipe.context.column or self.recipe.context.teacher_prompt:
            raise RecipeError("each row of this recipe has a context of its own; a new text has none")
        section = self.recipe.queries.model_copy(update={"messages": None, "prompt": "prompt"})
        fields = {"prompt": text}
        if self.context.chunks:  # nobody said which
            fields[self.recipe.context.chunk_column] = nearest_chunk(text, self.context.chunks).name
        return self.pair(Row(id="typed", fields=fields, origin="typed"), section)

    def chunk_of(self, row: Row, section: DataSection) -> Chunk | None:
        """The chunk that the teacher reads with this row; None where documents are not in chunks.

        Raises: `DataError` when the row names none, or one that does not exist.
        """
        c, chunks = self.recipe.context, {chunk.name: chunk for chunk in self.context.chunks}
        if not chunks:
            return None
        name = row.fields.get(c.chunk_column)
        if name is None and c.chunk_bind == "words":
            return nearest_chunk(self.query_text(row, section), self.context.chunks)
        if name not in chunks:
            shown = list(chunks)[:6]
            raise DataError(
                f"{row.origin}: the documents are in chunks, and the query names none of them",
                expected=f"{c.chunk_column!r} with one of {', '.join(shown)}{', ...' if len(chunks) > len(shown) else ''}",
                found=repr(name)[:80] if name is not None else "no such column",
                fix='name the chunk, or let the words decide: context.chunk_bind = "words"',
            )
        return chunks[name]

    def _system(self, row: Row, section: DataSection) -> str | None:
        """The teacher's system text for a row, without the row's own."""
        chunk = self.chunk_of(row, section)
        return self.context.system if chunk is None else self.context.with_chunk(chunk)

    def served(self, messages: list[Message], system: str | None = None) -> tuple[int, ...]:
        """The prompt for messages as they are, behind `system` or else behind what the student keeps; in the text style,
        their text alone."""
        if self.recipe.prompt.style == "text":
            text = "".join(str(m["content"]) + self.recipe.prompt.separator for m in messages)
            return tuple(self._opened([text])[0])
        system = self.recipe.context.student_system if system is None else system
        head = [{"role": "system", "content": system}] if system is not None else []
        return tuple(self._render([*head, *messages], True, teacher=False))

    def served_query(self, row: Row, section: DataSection, system: str) -> tuple[int, ...]:
        """The prompt of a row's query behind a `system` prompt of somebody else's, which takes the place of its own."""
        return self.served([m for m in self._query_messages(row, section) if m["role"] != "system"], system)

    def _messages(self, row: Row, column: str) -> list[Message]:
        value = row.fields.get(column)
        if isinstance(value, str):
            return [{"role": "user", "content": value}]
        if (
            isinstance(value, list)
            and value
            and all(isinstance(m, dict) and "role" in m and ("content" in m or m.get("tool_calls")) for m in value)
        ):
            return [with_arguments(m, as_object) for m in value]
        raise DataError(
            f"{row.origin}: column {column!r} is neither a text nor a list of messages",
            expected='[{"role": "user", "content": "..."}]',
            found=repr(value)[:80],
        )

    def _query_messages(self, row: Row, section: DataSection) -> list[Message]:
        if section.messages:
            return self._asks(row, self._messages(row, section.messages))
        return [{"role": "user", "content": self.query_text(row, section)}]

    def _asks(self, row: Row, messages: list[Message]) -> list[Message]:
        """A query ends with a question: with the answer in the prompt there would be nothing to learn."""
        if messages[-1]["role"] == "assistant":
            raise DataError(
                f"{row.origin}: the messages end with an assistant's turn",
                expected="a user's (or tool's) turn last, which the model then answers",
                found=repr(messages[-1])[:80],
                fix="take the last turn out of the messages, and put its text into the answer column",
            )
        return messages

    def demo_messages(self, demos: Sequence[Row]) -> list[Message]:
        """Demonstrations as turns."""
        return [
            message
            for row in demos
            for message in (
                {"role": "user", "content": self._demo_query(row)},
                {"role": "assistant", "content": self._demo_answer(row).strip()},
            )
        ]

    def _chat(self, row: Row, section: DataSection, *, teacher: bool) -> tuple[list[Message], list[Message]]:
        """(messages before the query, the query's messages), a system message first if there is one."""
        c = self.recipe.context
        query = self._query_messages(row, section)
        if teacher and (told := self.recipe.completions.scratchpad):
            query = [*query[:-1], {**query[-1], "content": f"{said(query[-1])}\n\n{told}"}]
        if teacher and c.teacher_prompt:
            return [], self._asks(row, self._messages(row, c.teacher_prompt))
        own: list[Message] = []
        system = self._system(row, section) if teacher else c.student_system
        if teacher and c.column:
            value = row.fields.get(c.column)
            if isinstance(value, str):
                system = value if system is None else f"{system}\n\n{value}"
            else:
                own = self._messages(row, c.column)
        if teacher:
            before = [*self.context.messages, *self.demo_messages(self.context.demos), *own]
        else:
            before = self.demo_messages(self.kept_demos)
        head = [{"role": "system", "content": system}] if system is not None else []
        loose = [m for m in [*before, *query] if m["role"] == "system"]
        if len(head) + len(loose) > 1:
            raise DataError(
                f"{row.origin}: {'teacher' if teacher else 'student'} prompt with {len(head) + len(loose)} system messages",
                expected="one",
                fix="put the system text either into the context or into the rows, not into both",
            )
        if loose:  # templates take a system message only at the start
            head, before, query = loose, [m for m in before if m not in loose], [m for m in query if m not in loose]
        return [*head, *before], query

    def _text(self, row: Row, section: DataSection, *, teacher: bool) -> tuple[str, str]:
        """(text before the query, the query)."""
        p, c = self.recipe.prompt, self.recipe.context
        if teacher and c.teacher_prompt:
            return "", self._plain(row, c.teacher_prompt)
        parts = []
        demos: Sequence[Row] = ()
        if teacher:
            own = [self._plain(row, c.column)] if c.column else []
            parts = [part for part in (self._system(row, section), *own, p.instruction) if part]
            demos = self.context.demos
        else:
            parts = [p.student_instruction] if p.student_instruction else []
            demos = self.kept_demos
        parts += [self._demo_query(d) + self._demo_answer(d) for d in demos]
        return "".join(part + p.separator for part in parts), self.query_text(row, section)

    def _plain(self, row: Row, column: str) -> str:
        value = row.fields.get(column)
        if isinstance(value, str):
            return value
        raise DataError(
            f"{row.origin}: column {column!r} is not a text",
            expected='a text, since prompt.style = "text" has no roles',
            found=repr(value)[:80],
            fix='write it as a text, or use prompt.style = "chat"',
        )

    def _render(self, messages: list[Message], generation: bool, *, teacher: bool, tokenize: bool = True) -> Any:
        """The template's text or ids. Both come from the one call, so ids are never made from rendered text here."""
        try:
            out = self._template(messages, generation, teacher=teacher, tokenize=tokenize)
        except Exception as error:  # templates raise what they like (jinja2 errors among it)
            raise DataError(
                f"the chat template of {self.recipe.model.name} refuses these messages: {error}",
                found=" ".join(str(m.get("role")) for m in messages[:12]),
                fix="many templates want user and assistant in turn, and the system message first or not at all",
            ) from None
        return list(out) if tokenize else str(out)

    def _template(
        self, messages: list[Message] | list[list[Message]], generation: bool, *, teacher: bool, tokenize: bool
    ) -> Any:
        kwargs = self._template_kwargs(teacher=teacher)
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation, tokenize=tokenize, return_dict=False, **kwargs
        )

    def _template_kwargs(self, *, teacher: bool) -> dict[str, Any]:
        p = self.recipe.prompt
        return {**p.template_kwargs, **(p.teacher_template_kwargs if teacher else p.student_template_kwargs)}

    def _ids(self, rows: Sequence[Row], section: DataSection, *, teacher: bool) -> list[tuple[int, ...]]:
        """The ids of one side of some rows, tokenised together: the tokenizer then uses all cores."""
        bos = self.tokenizer.bos_token_id
        if self.recipe.prompt.style == "chat":
            chats = [[*before, *query] for before, query in (self._chat(row, section, teacher=teacher) for row in rows)]
            found = self._render_all(chats, teacher=teacher)
        else:
            found = self._opened(["".join(self._text(row, section, teacher=teacher)) for row in rows])
        for row, ids in zip(rows, found, strict=True):
            if bos is not None and ids[:2] == [bos, bos]:
                raise ModelError(
                    f"the prompt of {row.origin} starts with two BOS tokens",
                    expected="at most one",
                    fix="remove the BOS text from the chat template or the pattern; the tokenizer adds it",
                )
        return [tuple(ids) for ids in found]

    def _opened(self, texts: list[str]) -> list[list[int]]:
        """The ids of prompts in the text style: with BOS, where the tokenizer puts one."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        found: list[list[int]] = self.tokenizer(texts)["input_ids"]
        for ids in found:
            if len(ids) > 1 and ids[-1] == eos != bos:
                ids.pop()  # a tokenizer that ends every text with EOS would end the prompt before the answer
        return found

    def _render_all(self, chats: list[list[Message]], *, teacher: bool) -> list[list[int]]:
        """`_render` of several chats, as ids."""
        try:
            return [list(ids) for ids in self._template(chats, True, teacher=teacher, tokenize=True)]
        except Exception:  # one of them is refused: which, and why, is said when they are rendered alone
            return [self._render(messages, True, teacher=teacher) for messages in chats]

    def _date_note(self) -> list[str]:
        """That the chat template writes today's date into a prompt, if it does."""
        template = str(self.tokenizer.chat_template or "")
        call = re.search(r"(?:(\w+) *= *)?strftime_now\([\"'](.+?)[\"']\)", template)
        if not call:
            return []
        name, date = call[1], datetime.now().strftime(call[2])
        may_be_given = bool(name and re.search(rf"\b{name} is (not )?defined", template))
        student = self.recipe.context.student_system is not None
        told = {"teacher": bool(self.context.system or self.context.chunks), "student": student}
        sides = []
        for side, system in told.items():
            turns = [{"role": "system", "content": "b"}] * system + [{"role": "user", "content": "a"}]
            given = may_be_given and name in self._template_kwargs(teacher=side == "teacher")
            if not given and date in self._render(turns, True, teacher=side == "teacher", tokenize=False):
                sides.append(side)
        if not sides:
            return []
        where = "both prompts" if len(sides) == 2 else f"the {sides[0]}'s prompt"
        pin = (
            f'prompt.template_kwargs = {{ {name} = "{date}" }} pins it'
            if may_be_given
            else "it has no argument for that"
        )
        return [
            f"the chat template puts today's date ({date}) into {where}: on another day, when the student is served or "
            f"the run is continued or evaluated again, it is another; {pin}"
        ]

    def template_notes(self) -> list[str]:
        """What a reader must know of the chat template: that it writes the date into a prompt, and what it writes at the
        start of an answer, where that is a think block or differs between the sides: such text is part of the prompt and
        never supervised."""
        if self.recipe.prompt.style == "text":
            return []
        probe = [{"role": "user", "content": "a"}]
        starts = {}
        for side in ("teacher", "student"):
            whole, before = (
                self._render(probe, generation, teacher=side == "teacher", tokenize=False)
                for generation in (True, False)
            )
            starts[side] = whole.removeprefix(before)
        found = self._date_note()
        found += [
            f"the chat template begins the {side}'s answer with {' '.join(start.split())!r}; it is part of the prompt and "
            "is not supervised"
            for side, start in starts.items()
            if "think>" in start
        ]
        if len(set(starts.values())) > 1:
            found.append(
                "teacher and student begin their answers differently, so the student learns to answer as a teacher that was "
                "asked in another way; serve it with the student's template arguments, which the adapter card shows"
            )
        thinks = "enable_thinking" in (self.tokenizer.chat_template or "") and "think>" not in starts["teacher"]
        if thinks and self.recipe.completions.source == "teacher":
            found.append(
                "the teacher may think before it answers, and its thoughts are taught, too: switch them off with "
                "prompt.teacher_template_kwargs = { enable_thinking = false }"
            )
        return found

    # -- what people look at ------------------------------------------------------------------------------------------

    def parts(self, row: Row, section: DataSection, *, teacher: bool) -> list[Part]:
        """The prompt as text, cut where its kind changes; `template` is what the chat template added by itself."""
        if self.recipe.prompt.style == "text":
            before, query = self._text(row, section, teacher=teacher)
            first = self._ids([row], section, teacher=teacher)[0][0]
            bos: list[Part] = (
                [(self.tokenizer.decode([first]), "template")] if first == self.tokenizer.bos_token_id else []
            )
            return [part for part in [*bos, (before, "context"), (query, "query")] if part[0]]
        earlier, asked = self._chat(row, section, teacher=teacher)
        messages = [*earlier, *asked]
        text = self._render(messages, True, teacher=teacher, tokenize=False)
        # Marks in place of the contents tell exactly what the template wrote around them.
        marked = [{**m, "content": f"\ue000{i}\ue000"} if said(m) else m for i, m in enumerate(messages)]
        pieces = self._render(marked, True, teacher=teacher, tokenize=False).split("\ue000")
        parts: list[Part] = []
        for i, piece in enumerate(pieces):
            if i % 2 == 0:
                parts.append((piece, "template"))
            else:
                content = str(messages[int(piece)]["content"])
                kind = "query" if int(piece) >= len(earlier) else "context"
                parts.append((content if content + pieces[i + 1] in text else content.strip(), kind))
        if "".join(part for part, _ in parts) != text:  # a template that changes what it is given
            return [(text, "template")]
        return [part for part in parts if part[0]]

    def shown(self, row: Row, section: DataSection, split: str, completion: Sequence[int] | None) -> dict[str, Any]:
        """A row as `ctxdistill show` prints it."""
        pair = self.pair(row, section)
        sides = {
            name: [{"text": text, "kind": kind} for text, kind in self.parts(row, section, teacher=name == "teacher")]
            for name in ("teacher", "student")
        }
        tokens = (
            None if completion is None else [list(p) for p in zip(self.pieces(completion), completion, strict=True)]
        )
        return {
            "id": row.id, "split": split, **sides, "completion": tokens,
            "teacher_tokens": len(pair.teacher), "student_tokens": len(pair.student),
        }  # fmt: skip

    @functools.cached_property
    def _pieces(self) -> list[str]:
        """What of the context the recipe does not let the student keep: each message, the system text, each document."""
        c = self.context
        keep = {said(m).strip() for m in self.demo_messages(self.kept_demos)}
        system = c.system or ""
        for name, text in c.documents.items():
            system = system.replace(_headed(name, text), "")
        found = [said(m) for m in (*c.messages, *self.demo_messages(c.demos))]
        found += [system, *c.documents.values(), self.recipe.prompt.instruction, *(k.text for k in c.chunks)]
        return [text for text in map(str.strip, found) if text not in keep]

    def check_no_leak(self, row: Row, section: DataSection) -> None:
        """Raise `DataError` if the student's prompt holds a piece of the context that the recipe does not let it keep."""
        column = self.recipe.context.column
        own = row.fields.get(column) if column else None
        if isinstance(own, list):  # they may ask the query itself, to show how it is answered
            query = said(self._query_messages(row, section)[-1])
            own = [said(m) for m in own if said(m) != query]
        else:
            own = [own] if isinstance(own, str) else []
        prompt = "".join(text for text, _ in self.parts(row, section, teacher=False))
        for piece in (*self._pieces, *map(str.strip, own)):
            # Short pieces ("yes", "What is 2 + 2?") occur by chance; a repeated query is found by `rows.check_overlap`.
            if len(piece) >= 40 and piece in prompt:
                raise DataError(
                    f"{row.origin}: the student's prompt contains a part of the context",
                    expected="a prompt without it, since the adapter shall replace it",
                    found=re.sub(r"\s+", " ", piece[:80]) + "...",
                    fix="take the context out of the queries, of context.student_system and of prompt.student_instruction",
                )

    def student_prompt(self) -> dict[str, Any]:
        """The exact prompt to serve with: its text, with `{query}` (or `{column}` for a pattern of several columns) in
        the place of what changes; what the chat template put into it by itself; and how to tokenise it."""
        p, chat = self.recipe.prompt, self.recipe.prompt.style == "chat"
        names = sorted(fields_of(p.pattern)) if self.recipe.queries.messages is None else ["prompt"]
        fields = {name: "{query}" if name == "prompt" else f"{{{name}}}" for name in names}
        section = self.recipe.queries.model_copy(update={"messages": None, "prompt": "prompt"})
        text = "".join(
            t for t, _ in self._served_parts(Row(id="", fields=fields, origin="the student's prompt"), section)
        )
        inserts = ""
        if chat and self.recipe.context.student_system is None:
            turns = [{"role": role, "content": "\ue000"} for role in ("user", "assistant", "user")]
            first, _, between, _ = self._render(turns, True, teacher=False, tokenize=False).split("\ue000")
            shared = 0  # the header of a user's turn, which is no insertion
            while shared < min(len(first), len(between)) and first[-1 - shared] == between[-1 - shared]:
                shared += 1
            inserts = first[: len(first) - shared].removeprefix(self.tokenizer.bos_token or "")
        return {
            "text": text,
            "template_inserts": inserts,
            "fields": list(fields.values()),
            "add_special_tokens": not chat,
        }

    def _served_parts(self, row: Row, section: DataSection) -> list[Part]:
        """The student's parts without the BOS that tokenising adds in the text style."""
        if self.recipe.prompt.style == "text":
            return [(text, "query") for text in self._text(row, section, teacher=False)]
        return self.parts(row, section, teacher=False)

    @property
    def fingerprint(self) -> str:
        """Hash of the context."""
        c = self.context
        chunks = [[[k.name, k.text] for k in c.chunks]] if c.chunks else []
        return fingerprint([c.system, c.messages, [r.fields for r in c.demos], self.recipe.prompt.instruction, *chunks])
