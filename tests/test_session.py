"""A loaded run that answers many messages: the numbers of the page, against slow and obvious ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from ctxdistill import display, pipeline
from ctxdistill.check import check
from ctxdistill.errors import CtxDistillError, FitError, RecipeError, RunError
from ctxdistill.evaluate import ARMS
from ctxdistill.export import export
from ctxdistill.lm import LM
from ctxdistill.recipe import ModelSection, Recipe
from ctxdistill.session import TOP, Answer, Piece, Session


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("job")
    (folder / "model").symlink_to(llama)
    pipeline.distill(Recipe.from_dict(tiny.recipe_dict(folder), base_dir=folder), folder / "run")
    return folder


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return Session.load(folder / "run")


def answers(session: Session, text: str, **options: Any) -> dict[str, Answer]:
    return {part.arm: part for part in session.answer(text, **options) if isinstance(part, Answer)}


def states(lm: LM, *, on: bool, strength: float = 1.0) -> torch.Tensor:
    with torch.no_grad(), lm.adapter(on, strength):
        return lm.hidden([([*range(5, 30)], 24)])[0]


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 1.5])
def test_strength_scales_the_update_of_the_weights(folder: Path, session: Session, strength: float) -> None:
    base, student = states(session.lm, on=False), states(session.lm, on=True)
    found = states(session.lm, on=True, strength=strength)
    if strength in (0.0, 1.0):
        assert torch.equal(found, base if strength == 0 else student)
    else:
        assert not torch.allclose(found, base, atol=1e-3) and not torch.allclose(found, student, atol=1e-3)
    assert torch.equal(states(session.lm, on=True), student), "the adapter is not as it was"
    # the slow way: add strength * alpha / rank * B A to a fresh base model's weights
    slow = LM.load(ModelSection(name=str(folder / "model")))
    tensors = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text())
    scale = strength * config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for name in [n for n in tensors if ".lora_A." in n]:
            weight = slow.model.get_parameter(
                name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            )
            weight += scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    torch.testing.assert_close(found, states(slow, on=False), atol=2e-4, rtol=1e-4)


def test_pieces_add_up_and_each_arm_says_what_it_took(session: Session) -> None:
    parts = list(session.answer("say emu", max_new_tokens=5))
    assert list(dict.fromkeys(part.arm for part in parts)) == ["zero_shot", "in_context", "distilled"]
    pair = session.prompter.pair_of_text("say emu")
    for arm, done in answers(session, "say emu", max_new_tokens=5).items():
        said = "".join(part.text for part in parts if isinstance(part, Piece) and part.arm == arm)
        assert done.text.startswith(said)
        prompt = pair.teacher if arm == "in_context" else pair.student
        with session.lm.adapter(arm == "distilled"):
            (ids,) = session.lm.generate([prompt], max_new_tokens=5, ends=session.prompter.ends)
        assert done.ids == tuple(ids)
        assert done.prompt_tokens == len(prompt)
        assert done.seconds > 0
    found = answers(session, "say emu", max_new_tokens=5)
    assert found["in_context"].flops > 2 * found["distilled"].flops


def test_with_label_words_every_arm_chooses_one_as_in_the_evaluation(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["why", "yes", "how"]
    raw = tiny.recipe_dict(
        job, prompt={"label_words": words}, completions={"source": "data"},
        context={"system": "Say why, yes or how to every word that you are given."},
        eval={"data": "eval.jsonl", "max_new_tokens": 6, "latency_rows": 0, "bootstrap": 100},
    )  # fmt: skip
    for name in ("queries.jsonl", "eval.jsonl"):
        tiny.write_jsonl(
            job / name, [{"prompt": row["prompt"], "answer": "yes"} for row in tiny.read_jsonl(job / name)]
        )
    pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run")
    session = Session.load(job / "run")
    lines = session.run.read_jsonl("scores.jsonl")
    assert len({line["prediction"] for line in lines}) > 1 and {line["arm"] for line in lines} == {*ARMS}
    assert any(line["greedy"] not in words for line in lines)
    for query in session.held_out:
        parts = list(session.answer(query, max_new_tokens=1))
        said = {part.arm: part.text for part in parts if isinstance(part, Piece)}
        assert said == {line["arm"]: line["prediction"] for line in lines if line["query"] == query}
        done = {part.arm: part for part in parts if isinstance(part, Answer)}
        assert {arm: answer.text for arm, answer in done.items()} == said
        for answer in done.values():
            assert session.prompter.text(answer.ids) == answer.text and answer.ended
            assert answer.seconds > 0 and answer.flops > 0
    typed = answers(session, "say hamster", strength=0.0)
    assert typed["distilled"].text == typed["zero_shot"].text and {a.text for a in typed.values()} <= {*words}
    # whoever is handed the adapter is told that a server may write what it likes
    made = export(job / "run", "peft", job / "out")
    assert made["label_words"] == words
    capsys.readouterr()
    display.exported(display.console(), made)
    assert (
        "hold the server to the label words, among which the results were chosen: why, yes, how"
        in capsys.readouterr().out
    )
    found = check(job / "out", job / "run", rows=4)
    assert found["labels"] == sum(row["export"].strip() in words for row in found["answers"])
    display.checked(display.console(), found)
    assert f"; {found['labels']} are label words" in capsys.readouterr().out


def test_what_was_asked_is_remembered_and_only_the_student_is_asked_again(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = answers(session, "say yak", max_new_tokens=4)
    asked: list[Any] = []
    generate = session.lm.generate
    monkeypatch.setattr(session.lm, "generate", lambda *a, **k: (asked.append(a), generate(*a, **k))[1])
    assert answers(session, "say yak", max_new_tokens=4) == first
    assert asked == []
    again = answers(session, "say yak", max_new_tokens=4, strength=0.0)
    assert len(asked) == 1
    assert again["distilled"].ids == first["zero_shot"].ids
    assert again["in_context"] is first["in_context"]


def test_token_differences_are_the_evaluation_s(session: Session) -> None:
    lines = session.run.read_jsonl("scores.jsonl")
    row = next(line for line in lines if line["arm"] == "distilled")
    teacher = answers(session, row["query"])["in_context"]
    for arm, strength in (("distilled", 1.0), ("zero_shot", 0.0)):
        measured = next(line for line in lines if line["arm"] == arm and line["row"] == row["row"])["token_kl"]
        found = session.differences(row["query"], teacher.ids, strength=strength)
        assert [t.text for t in found] == [text for text, _ in measured]
        assert [t.kl for t in found] == pytest.approx([kl for _, kl in measured], abs=2e-4)
        assert max(t.kl for t in found) > 1e-3


def test_the_alternatives_are_the_likeliest_next_tokens(session: Session) -> None:
    ids = answers(session, "say emu", max_new_tokens=5)["in_context"].ids
    pair, strength = session.pair("say emu"), 0.4
    found = session.differences("say emu", ids, strength=strength)
    for position, token in enumerate(found):
        sides = []
        for prompt, on in ((pair.teacher, False), (pair.student, True)):
            with torch.no_grad(), session.lm.adapter(on, strength if on else 1.0):
                row = torch.tensor([[*prompt, *ids[:position]]])
                sides.append(session.lm.model(input_ids=row, use_cache=False).logits[0, -1].double().log_softmax(-1))
        for shown, logprobs in zip((token.teacher, token.student), sides, strict=True):
            best = logprobs.exp().topk(TOP)
            assert [chance for _, chance in shown] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert shown[0][0] == session.prompter.pieces([int(best.indices[0])])[0]
        kl = (sides[0].exp() * (sides[0] - sides[1])).sum().item()
        assert token.kl == pytest.approx(kl, abs=1e-3)


def test_held_out_rows_are_known_by_their_query(session: Session) -> None:
    assert len(session.held_out) == 8
    assert session.pair("please say ant").answer == "ANT"
    assert session.pair("please say emu").answer is None


def test_a_row_of_several_columns_can_be_asked_and_a_typed_text_not(job: Path) -> None:
    rows = [{"a": f"word {n}", "b": "x", "answer": "y"} for n in range(12)]
    tiny.write_jsonl(job / "q.jsonl", rows)
    raw = tiny.recipe_dict(
        job, queries={"data": "q.jsonl"}, eval={"max_new_tokens": 4, "latency_rows": 0, "bootstrap": 100, "share": 0.3},
        context={"system": "Shout every word that you are given."}, prompt={"pattern": "{a} and {b}"},
    )  # fmt: skip
    pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run")
    session = Session.load(job / "run")
    query = next(iter(session.held_out))
    assert set(answers(session, query)) == {"zero_shot", "in_context", "distilled"}
    with pytest.raises(RecipeError, match="columns a, b"):
        answers(session, "hello")
    (job / "q.jsonl").unlink()
    assert Session.load(job / "run").held_out == {}


def test_a_session_takes_over_the_model_of_the_one_before(folder: Path, session: Session) -> None:
    fresh = Session.load(folder / "run")
    following = Session.load(folder / "run", before=fresh)
    assert following.lm is fresh.lm
    assert torch.equal(states(following.lm, on=True), states(session.lm, on=True))
    assert torch.equal(states(following.lm, on=False), states(session.lm, on=False))


@pytest.mark.parametrize("how", ["damaged", "incomplete"])
def test_a_run_that_cannot_follow_leaves_the_one_before_as_it_was(
    folder: Path, session: Session, tmp_path: Path, how: str
) -> None:
    first = Session.load(folder / "run")
    shutil.copytree(folder / "run", tmp_path / "bad")
    weights = tmp_path / "bad" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(max(tensors))
    save_file(tensors, weights)
    if how == "damaged":
        weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CtxDistillError, match=r"the adapter in .* (is damaged|does not fit)"):
        Session.load(tmp_path / "bad", before=first)
    for on in (True, False):
        assert torch.equal(states(first.lm, on=on), states(session.lm, on=on))
    following = Session.load(folder / "run", before=first)
    assert torch.equal(states(following.lm, on=True), states(session.lm, on=True))


def test_answers_that_are_too_long_are_told_how_long_they_may_be(session: Session) -> None:
    room = session.lm.window - len(session.prompter.pair_of_text("say emu").teacher)
    with pytest.raises(FitError, match="does not fit") as caught:
        list(session.answer("say emu", max_new_tokens=100_000))
    assert f"at most {room}" in caught.value.fix and "--max-new-tokens" in caught.value.fix
    with pytest.raises(FitError, match="does not fit") as caught:
        list(session.answer("say emu" * session.lm.window, max_new_tokens=1))
    assert "shorten the text" in caught.value.fix


def test_failures_reach_the_reader_and_leave_the_session_usable(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(FitError, match="your text"):
        list(session.answer("x" * 600))

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(session.lm, "generate", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(session.answer("say gnat"))
    abandoned = session.answer("say gnat", max_new_tokens=300, strength=0.5)
    next(abandoned)
    abandoned.close()
    assert len(answers(session, "say gnat", max_new_tokens=3)) == 3
    with pytest.raises(RunError, match="does not exist"):
        Session.load(tmp_path / "none")
