from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctxdistill.arms import ARMS, CONTROLS, Arm
from ctxdistill.errors import RecipeError
from ctxdistill.grid import Study, cell_key, model_label
from ctxdistill.recipe import Recipe, TrainSection

ROOT = Path(__file__).parents[1]


def study(**sections: Any) -> Study:
    return Study.from_dict({"model": {"names": ["a/b"]}, "tasks": {"names": ["trec", "mnli"]}, **sections})


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_the_studies_that_ship_are_valid(path: Path) -> None:
    found = Study.load(path)
    assert found.name == path.stem and len({cell.id for cell in found.cells()}) == len(found.cells()) > 2


def test_the_grid_is_the_product_but_for_arms_that_nothing_changes() -> None:
    grid = {"demos": [2, 16], "sets": [0, 1, 2], "arms": ["zero_shot", "in_context", "cd_one", "ft_lora"]}
    cells = study(grid=grid).cells()
    assert len(cells) == 2 * (1 + 2 * 3 * 3)
    assert [c.id for c in cells[:4]] == [
        "b-trec-zero_shot",
        "b-trec-n2-set0-in_context",
        "b-trec-n2-set0-cd_one",
        "b-trec-n2-set0-ft_lora",
    ]
    assert (cells[0].n, cells[0].set) == (0, None)


def test_arms_of_the_paper_and_its_future_work_are_there() -> None:
    cube = {name: arm for name, arm in ARMS.items() if name.startswith("ab_")}
    assert len(cube) == 8 and len({(a.trains, a.targets, a.context) for a in cube.values()}) == 8
    one = ARMS["cd_one"].model_dump(exclude={"label", "about"})
    assert cube["ab_lora_soft_context"].model_dump(exclude={"label", "about"}) == one
    assert {ARMS[n].targets for n in ("ft_full", "ft_lora", "ft_head")} == {"gold"}
    assert {a.family for n, a in ARMS.items() if n.startswith("cd_")} == {"distill"}
    assert all(arm.about and arm.label for arm in ARMS.values())


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_is_its_arm_with_one_thing_changed(control: str) -> None:
    arm = study().arm(f"cd_many+{control}")
    assert (arm.family, arm.control, arm.control_of) == ("control", control, "cd_many")
    assert arm.context == ("none" if control == "zero_shot_teacher" else "many")
    assert arm.trains == ARMS["cd_many"].trains and CONTROLS[control] in arm.about


def test_an_arm_of_ones_own() -> None:
    made = study(
        arms={"mine": {"like": "cd_one", "queries": 32, "train": {"lr": 0.1}, "lora": {"rank": 2}}},
        grid={"arms": ["mine", "mine+shuffled_labels"]},
    )
    arm = made.arm("mine")
    assert (arm.queries, arm.label, arm.context) == (32, "mine", "one")
    assert made.training(arm, 3).lr == 0.1 and made.training(arm, 3).seed == 3 and made.adapter(arm).rank == 2
    assert made.training(ARMS["cd_one"], 0).lr == made.train.lr
    assert made.training(ARMS["ft_full"], 0).lr == made.full_lr
    assert made.training(ARMS["ft_lora"], 0).epochs == made.finetune.epochs


def test_one_value_is_a_list_of_one(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('[model]\nnames = "a/b"\n[tasks]\nnames = "trec"\n')
    more = ["model.names=/x/y.gguf", "grid.demos=4", "grid.sets=1", "grid.arms=zero_shot"]
    made = Study.load(tmp_path / "s.toml", more)
    assert made.model.names == ["/x/y.gguf"] and made.tasks.names == ["trec"]
    assert made.grid.demos == [4] and made.grid.sets == [1] and made.grid.arms == ["zero_shot"]


def test_a_table_changes_single_values_of_the_default() -> None:
    made = study(train={"epochs": 3})
    assert (made.train.epochs, made.train.validation, made.train.lr) == (3, 0.0, Study.model_fields["train"].default.lr)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"tasks": {"names": ["mnly"]}}, "unknown task 'mnly'; did you mean 'mnli'?"),
        ({"tasks": {"names": ["mnli"], "pattern": "papr"}}, "did you mean 'paper'?"),
        ({"tasks": {"names": ["mnli"], "ood": ["hanz"]}}, "did you mean 'hans'?"),
        ({"model": {"names": ["a/x", "b/x"]}}, "must differ, found x, x"),
        ({"grid": {"arms": ["cd_on"]}}, "unknown arm 'cd_on'; did you mean 'cd_one'?"),
        ({"grid": {"arms": ["cd_one+shuffeled_labels"]}}, "did you mean 'shuffled_labels'?"),
        ({"grid": {"arms": ["ft_lora+shuffled_labels"]}}, "belongs to an arm that learns from a teacher"),
        ({"grid": {"arms": ["zero_shot+shuffled_labels"]}}, "belongs to an arm that learns from a teacher"),
        ({"grid": {"arms": ["kd_bigger"]}}, "model.teacher: missing"),
        ({"grid": {"sets": [0, 0]}}, "grid.sets: expected different values"),
        ({"grid": {"demos": [0]}}, "grid.demos.0"),
        ({"grid": {"demo": [2]}}, "grid.demo: unknown key; did you mean 'demos'?"),
        ({"train": {"learning_rate": 1.0}}, "train.learning_rate: unknown key"),
        ({"arms": {"x": {"like": "nothing"}}, "grid": {"arms": ["x"]}}, "arms.x.like: unknown arm 'nothing'"),
        ({"arms": {"x": {"like": "cd_one", "query": 3}}, "grid": {"arms": ["x"]}}, "query: unknown key; did you mean 'queries'?"),
        ({"arms": {"x": {"like": "ft_lora", "context": "one"}}, "grid": {"arms": ["x"]}}, 'learns from the demonstrations themselves'),
        ({"arms": {"x": {"like": "cd_one", "train": {"lrr": 1.0}}}, "grid": {"arms": ["x"]}}, "arms.x.train.lrr: unknown key"),
        ({"arms": {"x": {"like": "cd_one", "lora": {"rank": 0}}}, "grid": {"arms": ["x"]}}, "arms.x.lora.rank: "),
        ({"tasks": {"names": ["trec"]}, "grid": {"arms": ["cd_one+irrelevant_context"]}}, "name two tasks or more"),
        ({"grid": {"arms": ["cd_many_calibrated"], "contexts": 1}}, "expected 2 or more, found 1"),
        ({"arms": {"x": {"like": "cd_one", "calibration": "demonstrations"}}, "grid": {"arms": ["x"]}}, 'must be "many"'),
        ({"arms": {"x": {"like": "zero_shot", "calibration": "queries"}}, "grid": {"arms": ["x"]}}, 'is "content_free"'),
        ({"arms": {"x": {"like": "zero_shot", "calibration": "demonstrations"}}, "grid": {"arms": ["x"]}}, 'is "content_free"'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        study(**sections)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("on_policy", 0.5), ("on_policy_ramp", 0.5), ("on_policy_temperature", 0.5), ("round_steps", 5),
        ("retain_weight", 1.0), ("validation", 0.1), ("patience", 1), ("shard", True),
    ],
)  # fmt: skip
def test_what_the_cells_do_not_use_is_refused(key: str, value: Any) -> None:
    mine = {"x": {"like": "cd_one", "train": {key: value}}}
    for sections, where in (
        ({"train": {key: value}}, "train"),
        ({"finetune": {key: value}}, "finetune"),
        ({"arms": mine, "grid": {"arms": ["x", "x+shuffled_labels"]}}, "arms.x.train"),
    ):
        with pytest.raises(RecipeError, match=rf"1 problem\n  - {where}\.{key}: a study does not use it"):
            study(**sections)
    plain = TrainSection.model_fields[key].default if key != "validation" else 0.0
    assert study(train={key: plain, "checkpoint_every": 5, "micro_batch": 2}).train.checkpoint_every == 5


def test_arms_that_contradict_themselves() -> None:
    for values in (
        {"trains": "head"},
        {"teacher": "bigger", "trains": "nothing"},
        {"targets": "gold", "context": "none", "demos_weight": 1.0},
    ):
        with pytest.raises(ValueError, match=r"targets|teacher"):
            Arm.model_validate(values)


def test_a_cell_is_made_again_when_what_it_depends_on_changes() -> None:
    base = study(grid={"sets": [0]})
    cells = {cell.arm: cell for cell in base.cells() if cell.task == "trec"}

    def changed(arm: str, **sections: Any) -> bool:
        return cell_key(study(**sections), cells[arm]) != cell_key(base, cells[arm])

    assert not changed(
        "cd_one", grid={"sets": [0, 1], "arms": ["cd_one"]}, name="other"
    )  # a grown grid keeps its cells
    assert not changed("cd_one", model={"names": ["a/b", "c/d"]})
    assert changed("cd_one", train={"lr": 0.1}) and not changed("ft_lora", train={"lr": 0.1})
    assert changed("ft_lora", finetune={"lr": 0.1}) and not changed("cd_one", finetune={"lr": 0.1})
    assert changed("cd_one", grid={"sets": [0], "queries": 64}) and changed("zero_shot", eval={"rows": 5})
    assert changed("cd_many", grid={"sets": [0], "contexts": 2}) and changed("cd_one", lora={"rank": 2})
    assert changed("cd_one", model={"names": ["a/b"], "window": 9})
    assert changed("cd_one", grid={"sets": [0], "draw": "paper"})
    assert changed("cd_one", label_weight=0.5)
    assert not changed("ft_lora", label_weight=0.5) and not changed("in_context", label_weight=0.5)
    here, there = ({"names": ["trec", "mnli"], "root": root} for root in ("here", "there"))
    assert changed("zero_shot", tasks=here)  # some files hold fewer rows than the hub does
    assert cell_key(study(tasks=here), cells["zero_shot"]) == cell_key(study(tasks=there), cells["zero_shot"])


def test_a_cell_with_another_tasks_demonstrations_depends_on_which_task_that_is() -> None:
    arms = {"sets": [0], "arms": ["cd_one", "cd_one+irrelevant_context"]}
    base, more, last = (
        study(grid=arms, tasks={"names": names})
        for names in (["trec", "mnli"], ["trec", "sst2", "mnli"], ["sst2", "trec", "mnli"])
    )
    plain, control = (next(c for c in base.cells() if (c.task, c.arm) == ("trec", arm)) for arm in arms["arms"])
    assert base.other_task("trec") == "mnli" == last.other_task("trec") and more.other_task("trec") == "sst2"
    assert cell_key(base, control) == cell_key(last, control) != cell_key(more, control)
    assert cell_key(base, plain) == cell_key(more, plain)


@pytest.mark.parametrize(
    ("name", "label"), [("facebook/opt-125m", "opt-125m"), ("/x/y/smol", "smol"), ("m/a.Q4_1.gguf", "a.Q4_1")]
)
def test_model_label(name: str, label: str) -> None:
    assert model_label(name) == label


def test_a_recipe_and_a_study_are_told_apart(tmp_path: Path) -> None:
    recipe, study = tmp_path / "my recipe.toml", tmp_path / "study.toml"
    recipe.write_text('[context]\nsystem = "Shout."\n')
    study.write_text('[tasks]\nnames = ["sst2"]\n')
    with pytest.raises(RecipeError, match="is a recipe and not a study") as caught:
        Study.load(recipe)
    assert caught.value.fix == f"ctxdistill distill '{recipe}'"
    with pytest.raises(RecipeError, match="is a study and not a recipe") as caught:
        Recipe.load(study)
    assert caught.value.fix == f"ctxdistill study {study}"


def test_an_arm_that_moves_the_demonstrations_of_many_contexts_makes_their_cells_anew() -> None:
    """Queries are drawn first, for all arms alike: more of them leave other rows for the second context and on."""
    arms = {"more": {"like": "cd_one", "queries": 120}, "few": {"like": "cd_one", "queries": 20}}
    small, same, large = (
        study(grid={"queries": 64, "sets": [0], "arms": ["cd_one", "cd_many", *more]}, arms=arms)
        for more in ([], ["few"], ["more"])
    )
    keys = [{c.arm: cell_key(s, c) for c in s.cells() if c.task == "trec"} for s in (small, same, large)]
    assert keys[0]["cd_many"] == keys[1]["cd_many"] != keys[2]["cd_many"]
    assert keys[0]["cd_one"] == keys[2]["cd_one"]  # the first context stays
