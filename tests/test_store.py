"""The target store: what is read is what was written, damage is found before it is used, and care loses nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ctxdistill import cli, store, upkeep
from ctxdistill.errors import RunError
from ctxdistill.rundir import RunDir, fingerprint
from ctxdistill.store import INDEX, USED, KeyTable, Place, Shard, Target, TargetStore, packed
from ctxdistill.upkeep import prune, stats, verify


def target(number: int, tokens: int = 3, kind: str = "hidden") -> Target:
    torch.manual_seed(number)
    tensors = {
        "hidden": {"hidden": torch.randn(tokens, 4)},
        "full": {"logprobs": torch.randn(tokens, 9)},
        "topk": {"topk_logprobs": torch.randn(tokens, 2), "topk_ids": torch.randint(9, (tokens, 2)).int()},
    }[kind]
    ids = tuple(range(number, number + tokens))
    return Target(fingerprint(number), ids, tensors if tokens else {})


def same(found: Target, wanted: Target) -> bool:
    tensors = found.tensors
    return (
        (found.key, found.ids) == (wanted.key, wanted.ids)
        and set(tensors) == set(wanted.tensors)
        and all(torch.equal(tensors[n], wanted.tensors[n]) and tensors[n].dtype == v.dtype for n, v in wanted.tensors.items())
    )  # fmt: skip


def filled(folder: Path, numbers: Iterable[int] = range(10), size: int = 4) -> TargetStore:
    made, every = TargetStore(folder), list(numbers)
    for i in range(0, len(every), size):
        made.add([target(n, tokens=n % 4) for n in every[i : i + size]])
    return made


def damage(folder: Path, number: int = 0) -> str:
    """Turn a bit of a shard's last byte; returns its name."""
    path = folder / list(store.read_index(folder))[number].shard
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    return path.name


@pytest.mark.parametrize("kind", ["hidden", "full", "topk"])
def test_rows_come_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    made = TargetStore(tmp_path / "t")
    wanted = [target(n, n % 3, kind) for n in range(9)]  # some without a token
    made.add(wanted[:5])
    made.add(wanted[5:])
    for one in (made, TargetStore(tmp_path / "t")):
        assert len(one) == 9 and all(same(one[t.key], t) for t in reversed(wanted))
        assert wanted[0].key in one and fingerprint("other") not in one
        with pytest.raises(KeyError):
            one[fingerprint("other")]


def test_the_table_of_keys_equals_a_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "RECENT", 7)
    table, plain = KeyTable(), dict[str, Place]()
    draw = np.random.default_rng(0)
    for number in range(60):
        keys = [fingerprint(int(i))[:-2] + "00" for i in draw.integers(0, 150, 5)]  # again and again, ending in a zero
        lengths = draw.integers(0, 9, 5).tolist()
        table.add(number, Shard("x", "", 0, [], keys, lengths))
        for key, length, start in zip(keys, lengths, np.cumsum([0, *lengths]).tolist(), strict=False):
            plain[key] = Place(number, start, length)
        assert all(table.find(key) == place for key, place in plain.items())
    assert len(table) == len(plain) > 100 and table.find(fingerprint("other")) is None


def test_reading_again_takes_no_memory(tmp_path: Path) -> None:
    made = filled(tmp_path / "t", range(300, 400), 50)
    keys = [target(n).key for n in range(300, 400) if n % 4]
    sum(len(made[key].tensors["hidden"]) for key in keys)
    tracemalloc.start()
    try:
        for _ in range(20):
            assert sum(len(made[key].tensors["hidden"]) for key in keys) == sum(n % 4 for n in range(300, 400))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 10 * 20 * len(keys)  # bytes a reading


def test_a_shard_that_is_whole_and_not_what_its_line_says_is_named(tmp_path: Path) -> None:
    def refused(raw: bytes, part: str, lengths: tuple[int, ...] = (3, 1)) -> None:
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        line = shard._replace(sha256=hashlib.sha256(raw).hexdigest(), bytes=len(raw), lengths=list(lengths))
        TargetStore(tmp_path / "t").adopt(line, raw)
        with pytest.raises(RunError, match=f"(?s){shard.shard} does not hold what index.jsonl says: .*{part}"):
            TargetStore(tmp_path / "t")[shard.keys[1]].tensors["hidden"]

    shard, raw = store.packed_shard([target(1), target(2, 1)])
    refused(raw, "asked for 2 from 3", (3, 2))
    refused(raw[:8] + raw[8:].replace(b'"F32"', b'"F64"'), "rows of hidden in|rows of ids in")
    refused(raw.replace(b'"F32"', b'"F33"'), "F33")
    refused(raw.replace(b'"ids"', b'"odd"'), "ids")
    refused(b"\xff" * 7 + raw[7:], "a header of")
    refused(b"", "")
    with open(tmp_path / "x", "wb") as file:
        file.write(raw)
    assert set(load_file(tmp_path / "x")) == {"hidden", "ids"}  # the library reads it as well


def test_a_shard_is_checked_once_and_before_its_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "t")
    name = damage(tmp_path / "t", 1)
    found = TargetStore(tmp_path / "t")  # nothing is read yet
    checked: list[str] = []
    check = store.check_shard
    monkeypatch.setattr(store, "check_shard", lambda folder, shard: checked.append(shard.shard) or check(folder, shard))
    for number in (1, 9, 2, 9, 1, 3):
        assert same(found[target(number, number % 4).key], target(number, number % 4))
    assert len(checked) == 2
    with pytest.raises(RunError, match=f"(?s){name} is damaged.*expected: sha256.*found: sha256.*targets prune"):
        found[target(5).key]


def test_a_kill_leaves_what_was_whole(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    filled(folder, range(8))
    whole = (folder / INDEX).read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[1])):
        if cut % 97 == 1:
            (folder / INDEX).write_bytes(whole[:-cut])
            assert len(TargetStore(folder)) == 4
    again = TargetStore(folder)
    again.add([target(n, n % 4) for n in range(4, 8)])
    assert (folder / INDEX).read_bytes() == whole
    assert all(same(TargetStore(folder)[target(n, n % 4).key], target(n, n % 4)) for n in range(8))


def test_damaged_and_strange_indexes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    filled(folder)
    lines = (folder / INDEX).read_text().splitlines()
    good = store.shard_of(lines[0].encode())
    elsewhere = store.line_of(good._replace(shard="../x")).decode()[:-1]
    flipped = [lines[0].replace(good.keys[1], good.keys[2]), lines[0].replace("[0, 1, 2, 3]", "[0, 1, 3, 2]")]
    assert lines[0] not in flipped
    for bad in ("{", "[]", '{"shard": 1}', "null", "1", '{"check": ""}', "{}", elsewhere, *flipped):
        (folder / INDEX).write_text("\n".join([lines[1], bad, *lines[2:], ""]))
        with pytest.raises(RunError, match=r"index\.jsonl:2 is damaged"):
            TargetStore(folder)
    (folder / INDEX).unlink()
    (folder / "index.json").write_text("{}")
    with pytest.raises(RunError, match=r"(?s)earlier version.*delete"):
        TargetStore(folder)


def test_processes_add_to_one_folder_at_the_same_time(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from test_store import *\n"
        "filled(Path(sys.argv[2]), range(int(sys.argv[3]), int(sys.argv[3]) + 120), 2)"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "t")]
    running = [subprocess.Popen([*arguments, str(start)]) for start in (0, 60)]  # 60 rows are made by both
    assert [process.wait(120) for process in running] == [0, 0]
    found = TargetStore(tmp_path / "t")
    assert len(found) == 180
    assert all(same(found[target(n, n % 4).key], target(n, n % 4)) for n in range(180))
    del found
    assert prune(tmp_path / "t")["dropped"] == {"unused": 0, "repeated": 60, "damaged": 0}


@pytest.mark.parametrize("earlier_name", [False, True])
def test_runs_that_differ_in_the_last_bit_leave_each_other_s_shards_whole(tmp_path: Path, earlier_name: bool) -> None:
    folder = tmp_path / "t"
    wanted = [target(n) for n in range(4)]
    other = [replace(t, tensors={"hidden": torch.nextafter(t.tensors["hidden"], torch.tensor(9.0))}) for t in wanted]
    one, two = TargetStore(folder), TargetStore(folder)
    shard, raw = store.packed_shard(wanted)
    name = f"{fingerprint([t.key for t in wanted])}.safetensors"  # of the keys alone
    one.adopt(shard._replace(shard=name) if earlier_name else shard, raw)
    two.add(other)
    assert all(same(one[t.key], t) for t in wanted) and all(same(two[t.key], t) for t in other)
    two.add(other)  # the same bits: one file
    assert len(list(folder.glob("*.safetensors"))) == 2 and verify(folder)["damaged"] == []
    found = stats(folder)
    assert (found["rows"], found["repeated"], found["leftovers"]) == (4, 8, 0)
    del one, two
    assert prune(folder)["dropped"] == {"unused": 0, "repeated": 8, "damaged": 0}
    assert len(list(folder.glob("*.safetensors"))) == stats(folder)["shards"] == 1
    assert all(same(TargetStore(folder)[t.key], t) for t in other)


# -- care -------------------------------------------------------------------------------------------------------------


def test_prune_puts_shards_together_and_drops_what_is_broken(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    filled(folder, range(40))
    more = TargetStore(folder)
    more.add([target(n, 2, "topk") for n in range(100, 103)])
    more.add([target(n, n % 4) for n in (1, 2)])  # again
    del more
    damage(folder, 3)  # rows 12 to 15
    (folder / "00.safetensors").write_bytes(b"half a shard")
    (folder / ".x.tmp").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    assert [d["rows"] for d in verify(folder)["damaged"]] == [4]
    found = prune(folder, full=300)
    assert found["dropped"] == {"unused": 0, "repeated": 2, "damaged": 4} and found["rows"] == 39
    assert 3 < found["shards"] < 12 == found["before"]["shards"]
    after = TargetStore(folder)
    wanted = [target(n, n % 4) for n in range(40) if n not in range(12, 16)] + [
        target(n, 2, "topk") for n in range(100, 103)
    ]
    assert len(after) == len(wanted) and all(same(after[t.key], t) for t in wanted)
    del after
    names = {p.name for p in folder.iterdir()}
    assert names == {s.shard for s in store.read_index(folder)} | {INDEX, store.LOCK, "notes.txt"}
    assert verify(folder)["damaged"] == [] and stats(folder)["leftovers"] == 0
    before = {p.name: sorted(p.read_bytes().splitlines()) for p in folder.iterdir()}
    prune(folder, full=300)
    assert {p.name: sorted(p.read_bytes().splitlines()) for p in folder.iterdir()} == before  # nothing is left to do


def test_a_prune_that_is_killed_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [target(n, n % 4) for n in range(60)]
    left = 0

    def ticking(work: Any) -> Any:
        def tick(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return work(*arguments, **more)

        return tick

    write, unlink = ticking(upkeep.write_atomic), ticking(Path.unlink)
    for moment in range(100):
        folder, left, killed = tmp_path / str(moment), moment, False
        filled(folder, range(60))
        with monkeypatch.context() as patch:
            patch.setattr(upkeep, "write_atomic", write)
            patch.setattr(Path, "unlink", unlink)
            try:
                prune(folder, full=500)
            except KeyboardInterrupt:
                killed = True
        after = TargetStore(folder)
        assert len(after) == 60 and all(same(after[t.key], t) for t in wanted)
        if not killed:
            break
    assert moment > 15 and not killed  # several places of both kinds were met


def test_what_is_in_use_is_not_pruned(tmp_path: Path) -> None:
    user = filled(tmp_path / "t")
    with pytest.raises(RunError, match="in use by a run"):
        prune(tmp_path / "t")
    del user
    holder = store.locked(tmp_path / "t", exclusive=True)
    with pytest.raises(RunError, match="being pruned"):
        TargetStore(tmp_path / "t")
    holder.close()
    assert prune(tmp_path / "t")["rows"] == 10


def run_folder(path: Path, shared: str | None) -> Path:
    path.mkdir()
    manifest = {"recipe": {"targets": {"dir": shared}}, "base_dir": str(path.parent)}
    (path / "recipe.json").write_text(json.dumps(manifest))
    return path


def test_only_a_run_of_its_own_drops_what_it_does_not_use(tmp_path: Path) -> None:
    own, other = run_folder(tmp_path / "own", None), run_folder(tmp_path / "other", "shared")
    used = packed(target(n).key for n in (3, 4, 5))
    for run, folder in ((own, own / "targets"), (other, tmp_path / "shared")):
        filled(folder)
        TargetStore(folder, run / USED).note_used(used[:1])
        TargetStore(folder, run / USED).note_used(used)
    assert len((own / USED).read_text().split()) == 3
    assert stats(own)["unused"] == 7 and stats(other)["unused"] is None
    assert prune(own)["dropped"]["unused"] == 7 and stats(own)["rows"] == 3 and stats(own)["unused"] == 0
    found = prune(other)
    assert found["dropped"]["unused"] == 0 and found["rows"] == 10 and not found["unused_known"]
    busy = RunDir(own)
    busy.lock()
    with pytest.raises(RunError, match="in use by process"):
        prune(own)
    busy.release()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "t"
    filled(folder)
    assert cli.main(["targets", "verify", str(folder)]) == 0
    assert "3 shards" in capsys.readouterr().out
    assert cli.main(["targets", "stats", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tokens = sum(n % 4 for n in range(10))
    assert (found["rows"], found["tokens"], found["shards"], found["kinds"]["hidden"]["rows"]) == (10, tokens, 3, 10)
    assert found["bytes"] == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert found["bytes_per_token"] == pytest.approx(found["bytes"] / tokens)
    assert cli.main(["targets", "stats", str(folder)]) == 0
    assert "bytes per token" in capsys.readouterr().out
    name = damage(folder)
    assert cli.main(["targets", "verify", str(folder)]) == 2
    assert name in capsys.readouterr().out
    assert cli.main(["targets", "prune", str(folder)]) == 0
    assert "4 damaged" in capsys.readouterr().out
    assert cli.main(["targets", "verify", str(folder)]) == 0
    assert cli.main(["targets", "stats", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
