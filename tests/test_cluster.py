"""Work on a cluster equals the same work alone, also when a worker is lost: with a stand-in for Ray, and with Ray itself on
two local nodes where it is installed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from ctxdistill import cli, cluster, pipeline
from ctxdistill import study as studies
from ctxdistill.cluster import AHEAD, fan_out, slots
from ctxdistill.errors import DataError, FitError, RunError
from ctxdistill.recipe import Recipe
from ctxdistill.study import study
from ctxdistill.tasks import TASKS
from test_study import cells, grid, task


def toys() -> None:
    """The tasks of `test_study`, in this process."""
    TASKS.setdefault("updown", task("updown", 0, "far"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(TASKS, "updown", task("updown", 0, "far"))
    tiny.save(tmp_path / "opt", "opt-350m", chat=False)
    (tmp_path / "x.txt").write_text("here\n")
    return tmp_path


class Lost(Exception):
    """A worker that died, as Ray says it."""


class FakeRay:
    """What `fan_out` calls of Ray, in this process: the last item that was begun is done first."""

    def __init__(self, cpus: int = 2, lose: tuple[int, ...] = ()) -> None:
        self.cpus, self.lose, self.begun, self.most, self.open = cpus, lose, 0, 0, 0
        self.exceptions = SimpleNamespace(RayError=Lost, RayTaskError=ZeroDivisionError)
        self.shut = False

    def init(self, **options: Any) -> None:
        if options["address"] == "nowhere":
            raise ConnectionError("no such host")

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1.0}}] * self.cpus + [{"Alive": False, "Resources": {"GPU": 1}}]

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        assert options["num_cpus"] == 1 and options["max_retries"] > 0

        def begin(function: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
            self.begun, self.open = self.begun + 1, self.open + 1
            self.most = max(self.most, self.open)
            return (self.begun, function(*arguments))

        return lambda function: SimpleNamespace(remote=lambda *arguments: Ref(*begin(function, *arguments)))

    def wait(self, refs: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return [refs[-1]], refs[:-1]

    def get(self, ref: Any) -> Any:
        self.open -= 1
        if ref.number in self.lose:
            raise Lost("the worker died\nat great length")
        return ref.value

    def shutdown(self) -> None:
        self.shut = True


class Ref:
    def __init__(self, number: int, value: Any) -> None:
        self.number, self.value = number, value


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    made = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", made)
    studies._runner.cache_clear()
    cluster._prepared.cache_clear()
    return made


def square(x: int) -> int:
    if x == 13:
        raise FitError("too long", expected="short", found="long")
    return x * x


def test_every_item_is_done_once_and_few_at_a_time(fake: FakeRay) -> None:
    found = list(fan_out("local", square, range(10)))
    assert sorted(found) == [(i, i * i) for i in range(10)] and found != sorted(found)
    assert fake.begun == 10 and fake.most == 2 * AHEAD and fake.shut
    assert list(fan_out("local", square, [])) == []


def test_errors_cross_as_words(fake: FakeRay) -> None:
    with pytest.raises(FitError, match=r"(?s)too long.*expected: short.*found: long"):
        list(fan_out("local", square, [13]))
    fake.lose = (2,)
    with pytest.raises(RunError, match=r"(?s)could not do its work: the worker died\n.*goes on"):
        list(fan_out("local", square, range(3)))
    with pytest.raises(RunError, match=r"(?s)cannot reach the Ray cluster at nowhere: no such host.*ray start"):
        list(fan_out("nowhere", square, [1]))
    assert fake.shut


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any, job: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"ctxdistill\[ray\]"):
        list(fan_out("local", square, [1]))


def test_what_a_worker_takes() -> None:
    alone = {"Alive": True, "Resources": {"CPU": 8.0}}
    assert slots([alone, {"Alive": True, "Resources": {"CPU": 4.0}}]) == ({"num_cpus": 4.0}, 2)
    assert slots([alone, {"Alive": True, "Resources": {"CPU": 8, "GPU": 4}}]) == ({"num_gpus": 1, "num_cpus": 1}, 4)
    with pytest.raises(RunError, match="no CPU to give"):
        slots([{"Alive": False, "Resources": {"CPU": 8.0}}])


# -- the same as alone ------------------------------------------------------------------------------------------------


def shards(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "targets").glob("*.safetensors")}


def recipe(job: Path) -> Recipe:
    return Recipe.from_dict(tiny.recipe_dict(job, targets={"batch_size": 2}), base_dir=job)


def same_study(one: Path, other: Path) -> None:
    left, right = cells(one), cells(other)
    assert left.keys() == right.keys() and len(left) == 7
    for name in left:
        for folder in (one, other):
            assert sorted(p.name for p in (folder / "cells" / name).iterdir() if not p.is_dir()) == sorted(
                p.name for p in (one / "cells" / name).iterdir() if not p.is_dir()
            )
        a, b = ((folder / "cells" / name / "scores.jsonl").read_bytes() for folder in (one, other))
        assert a == b and a
        assert left[name]["key"] == right[name]["key"] and left[name]["training"] == right[name]["training"]
    draws = [{p.name: p.read_bytes() for p in (folder / "draws").iterdir()} for folder in (one, other)]
    assert draws[0] == draws[1] and draws[0]
    assert not list(other.glob(".*.tmp"))


SMALL = {"demos": [2], "sets": [0, 1], "arms": ["zero_shot", "in_context", "ft_lora", "cd_one"]}


def test_a_study_on_a_cluster_equals_one_alone(folder: Path, fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    study(grid(folder, grid=SMALL), folder / "alone")
    page = study(grid(folder, grid=SMALL), folder / "spread", ray="local")
    assert page.is_file() and fake.begun == 7
    same_study(folder / "alone", folder / "spread")
    study(grid(folder, grid=SMALL), folder / "spread", ray="local")
    assert fake.begun == 7  # finished cells are kept


def test_labelling_on_a_cluster_equals_labelling_alone(
    job: Path, fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "BATCHES", 2)
    alone = pipeline.label_rows(recipe(job), job / "alone")
    assert alone["rows"] == alone["made"] == 16 and len(shards(job / "alone")) > 7
    fake.lose = (2,)
    with pytest.raises(RunError, match="the worker died"):
        pipeline.label_rows(recipe(job), job / "spread", ray="local")
    begun = shards(job / "spread")
    assert 0 < len(begun) < len(shards(job / "alone"))
    fake.lose = ()
    found = pipeline.label_rows(recipe(job), job / "spread", ray="local")
    assert shards(job / "spread") == shards(job / "alone") and 0 < found["made"] < 16
    asked = fake.begun
    assert pipeline.label_rows(recipe(job), job / "spread", ray="local")["made"] == 0 and fake.begun == asked


def test_targets_of_another_kind_are_refused(job: Path, fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cluster._labelled

    def strange(spec: str, item: Any) -> Any:
        (line, raw), *rest = made(spec, item)
        return [({**line, "keys": ["00" * 16, *line["keys"][1:]]}, raw), *rest]

    monkeypatch.setattr(cluster, "_labelled", strange)
    with pytest.raises(RunError, match="targets of another kind"):
        pipeline.label_rows(recipe(job), job / "run", ray="local")
    assert not shards(job / "run")


def test_labelled_rows_are_found_by_distill(job: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    values = tiny.recipe_dict(job)
    import tomllib

    text = "\n".join(
        f"[{name}]\n" + "\n".join(f"{k} = {v!r}".replace("True", "true") for k, v in section.items())
        for name, section in values.items()
        if isinstance(section, dict)
    )
    assert tomllib.loads(text)["context"] == values["context"]
    (job / "r.toml").write_text(text)
    assert cli.main(["label", str(job / "r.toml"), "--out", str(job / "run")]) == 0
    assert "16 completions labelled, 16 of them now" in " ".join(capsys.readouterr().out.split())
    stages: list[str] = []
    run = pipeline.distill(Recipe.load(job / "r.toml"), job / "run", progress=lambda *a: stages.append(a[0]))
    before = {name for name in shards(job / "run") if name}
    assert run.evaluation["training"]["train_rows"] == 13 and before
    with pytest.raises(DataError):
        pipeline.label_rows(Recipe.load(job / "r.toml", ["queries.data='none.jsonl'"]), job / "other")


# -- Ray itself -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of two nodes with a CPU each, on this machine."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    paths = [str(Path(cluster.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # the nodes' workers find the package and the toy tasks
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    small = {"num_cpus": 1, "object_store_memory": 10**8, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=small)
    made.second = made.add_node(num_cpus=1, object_store_memory=10**8)
    yield made
    made.shutdown()


def dying(spec: str, number: int) -> dict[str, bytes]:
    """`_computed` with the toy tasks; the worker that gets cell 3 first is killed in the middle of it."""
    toys()
    import json

    mark = Path(json.loads(spec)["base_dir"]) / "killed"
    if number == 3 and not mark.exists():
        run = studies.run_cell

        def half(bench: Any, arm: Any, folder: Any, progress: Any) -> Any:
            run(bench, arm, folder, progress)
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)

        studies.run_cell = half
    return COMPUTED(spec, number)


COMPUTED = studies._computed


def test_a_study_on_ray_with_a_worker_killed(folder: Path, nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    study(grid(folder, grid=SMALL), folder / "alone")
    dying.__module__ = "test_cluster"
    monkeypatch.setattr(studies, "_computed", dying)
    study(grid(folder, grid=SMALL), folder / "spread", ray=nodes.address)
    assert (folder / "killed").exists()
    same_study(folder / "alone", folder / "spread")


def test_labelling_on_ray_with_a_node_lost(job: Path, nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "BATCHES", 1)
    pipeline.label_rows(recipe(job), job / "alone")
    lost: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "teacher (batches)" and done == 2 and not lost:
            lost.append(total)
            nodes.remove_node(nodes.second, allow_graceful=False)

    pipeline.label_rows(recipe(job), job / "spread", ray=nodes.address, progress=progress)
    assert lost and lost[0] > 4
    assert shards(job / "spread") == shards(job / "alone")
