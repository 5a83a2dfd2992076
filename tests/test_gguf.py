"""A GGUF file as a backbone: the same LM, the same tokens; converted once, whole or not at all."""

import json
import multiprocessing
import shutil

import pytest
import torch
import transformers

from families import TEXTS, WITHOUT_BOS, make_lm, make_tokenizer, own_tokenizer
from gguf_files import as_gguf_spells, write_gguf
from llm2comp.errors import BackboneError, RunError
from llm2comp.model.backbone import base_licence, load_backbone, weights_digest
from llm2comp.model.backbone.gguf import FORMAT_VERSION, MANIFEST_FILE, READ
from llm2comp.model.backbone.sources import fetch, model_source
from llm2comp.recipe import ModelSettings
from tiny_run import assert_refused, cli, no_file_over

WIDE = {"intermediate_size": 64}  # whole blocks of 32, as quantisation needs
# what a GGUF does not hold, and transformers assumes
ASSUMED = {
    "qwen3": {"head_dim": 128},
    "gemma2": {"query_pre_attn_scalar": 256, "final_logit_softcapping": 30.0},
    "gemma3": {"query_pre_attn_scalar": 256},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM2COMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny(family="llama"):
    tokenizer = (
        own_tokenizer("gemma3")
        if family.startswith("gemma")
        else make_tokenizer(family not in WITHOUT_BOS)
    )
    return make_lm(family, **WIDE | ASSUMED.get(family, {})), tokenizer


def tiny_file(tmp_path, family="llama", **settings):
    lm, tokenizer = tiny(family)
    tokens = "llama" if family.startswith("gemma") else "gpt2"
    write_gguf(tmp_path / f"{family}.gguf", lm, tokenizer, tokens_of=tokens, **settings)
    return tmp_path / f"{family}.gguf"


def settings(file, **more):
    return ModelSettings(name=str(file), device="cpu", **more)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_it_is_the_model_that_was_written(tmp_path, family):
    lm, tokenizer = tiny(family)
    backbone = load_backbone(settings(tiny_file(tmp_path, family)))
    ids = torch.tensor([[5, 9, 2, 77, 31, 200]])
    with torch.no_grad():
        assert torch.equal(backbone.lm(input_ids=ids).logits, lm(input_ids=ids).logits)
    assert [
        row[-len(own) :] for row, own in zip(backbone.tokenise(TEXTS), rows(tokenizer), strict=True)
    ] == rows(tokenizer)
    assert backbone.bos_id == tokenizer.bos_token_id
    assert backbone.tokenizer.model_max_length == 160


def rows(tokenizer):
    return tokenizer(TEXTS, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")],
)
def test_weights_are_what_gguf_itself_reads(tmp_path, kind, dtype):
    """Each weight, rounded once to the dtype that is kept; Llama's rotary halves put back in
    order.
    """
    lm, tokenizer = tiny()
    expected = write_gguf(tmp_path / "x.gguf", lm, tokenizer, kind)
    folder = fetch(str(tmp_path / "x.gguf"))
    kept = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert str(kept.dtype) == f"torch.{dtype}"
    found = kept.state_dict()
    assert set(found) == set(expected) == set(lm.state_dict())
    for path, weight in found.items():
        spelled = as_gguf_spells(path.removesuffix(".weight"), weight.float().numpy(), lm.config)
        assert torch.equal(
            torch.from_numpy(spelled), torch.from_numpy(expected[path]).to(kept.dtype).float()
        ), path
    exact = all(
        torch.equal(found[path].float(), weight) for path, weight in lm.state_dict().items()
    )
    assert exact == (kind == "F32")


def test_a_tied_head_is_kept_once(tmp_path):
    folder = fetch(str(tiny_file(tmp_path, "qwen2")))
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as kept:
        assert "lm_head.weight" not in kept.keys()  # noqa: SIM118


def test_the_second_time_nothing_is_converted(tmp_path, cache, monkeypatch):
    file = tiny_file(tmp_path)
    folder = fetch(str(file))
    digest = weights_digest(settings(file))
    assert base_licence(settings(file)) == "mit"
    monkeypatch.setattr("llm2comp.model.backbone.gguf._convert", None)
    assert fetch(str(file)) == folder
    again = file.rename(tmp_path / "moved.gguf")
    again.rename(file)
    assert model_source(settings(file)) == str(folder)
    assert weights_digest(settings(file)) == digest != ""
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == [folder.name]


def test_a_converted_model_is_its_gguf_whoever_converted_it(tmp_path):
    """The libraries write their version, and whether they were offline, into the folder."""
    file = tiny_file(tmp_path)
    digest, folder = weights_digest(settings(file)), fetch(str(file))
    manifest = json.loads((folder / "converted.json").read_text())
    for name in ("config.json", "tokenizer_config.json"):
        told = json.loads((folder / name).read_text()) | {"transformers_version": "9.9.9"}
        (folder / name).write_text(json.dumps(told))
        manifest["files"][name] = (folder / name).stat().st_size
    (folder / "converted.json").write_text(json.dumps(manifest))
    assert weights_digest(settings(file)) == digest
    assert weights_digest(settings(tiny_file(tmp_path, licence="other"))) != digest


def test_other_content_under_the_same_name_is_another_model(tmp_path):
    file = tiny_file(tmp_path)
    first, digest = fetch(str(file)), weights_digest(settings(file))
    lm, tokenizer = make_lm("llama", seed=5, **WIDE), make_tokenizer()
    write_gguf(file, lm, tokenizer)
    assert fetch(str(file)) != first
    assert weights_digest(settings(file)) != digest


@pytest.mark.parametrize(
    "harm",
    ["older version", "newer version", "truncated", "missing", "no manifest", "another file's"],
)
def test_a_cache_that_is_not_whole_is_made_anew(tmp_path, harm):
    file = tiny_file(tmp_path)
    folder = fetch(str(file))
    expected = (folder / "model.safetensors").read_bytes()
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    versions = {"older version": FORMAT_VERSION - 1, "newer version": FORMAT_VERSION + 1}
    changed = manifest | {"format_version": versions.get(harm, FORMAT_VERSION)}
    if harm == "another file's":
        changed["gguf"] = "0" * 64
    (folder / MANIFEST_FILE).write_text(json.dumps(changed))
    if harm == "truncated":
        (folder / "model.safetensors").write_bytes(expected[:-1])
    elif harm == "missing":
        (folder / "tokenizer.json").unlink()
    elif harm == "no manifest":
        (folder / MANIFEST_FILE).unlink()
    said = cli("fetch", file)
    assert (said.code, said.out.strip()) == (0, str(folder))
    assert "made anew" in said.err
    assert json.loads((folder / MANIFEST_FILE).read_text()) == manifest
    assert (folder / "model.safetensors").read_bytes() == expected
    assert (folder / "tokenizer.json").is_file()
    assert "made anew" not in cli("fetch", file).err


def _fetch_in_turn(file, cache, start, out):
    import os

    os.environ["LLM2COMP_CACHE"] = str(cache)
    start.wait()
    out.put(fetch(str(file)).stat().st_ino)


def test_two_processes_convert_once(tmp_path, cache):
    context = multiprocessing.get_context("fork")
    start, out, file = context.Event(), context.Queue(), tiny_file(tmp_path)
    processes = [
        context.Process(target=_fetch_in_turn, args=(file, cache, start, out)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    start.set()
    first, second = (out.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert first == second, "made twice"
    assert [path.name for path in (cache / "models").iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_leaves_nothing(tmp_path, cache):
    file = tiny_file(tmp_path)
    with (
        pytest.raises(RunError, match="cannot write: File too large") as error,
        no_file_over(20_000),
    ):
        fetch(str(file))
    assert "LLM2COMP_CACHE" in error.value.fix
    assert [path.name for path in (cache / "models").iterdir() if path.suffix != ".lock"] == []
    assert fetch(str(file)).is_dir()


def test_a_cache_that_cannot_be_written(tmp_path, cache):
    file = tiny_file(tmp_path)
    cache.write_text("a file stands here")
    with pytest.raises(RunError, match="cannot write") as error:
        fetch(str(file))
    assert "LLM2COMP_CACHE" in error.value.fix


def test_a_read_only_cache_that_has_it_is_read(tmp_path, cache, monkeypatch):
    file = tiny_file(tmp_path)
    folder = fetch(str(file))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("llm2comp.system.cache.FileLock", refuse)
    monkeypatch.setattr("llm2comp.system.folders.tempfile.mkdtemp", refuse)
    assert load_backbone(settings(file)).name == str(file)
    shutil.rmtree(folder)
    with pytest.raises(RunError, match="cannot write: Permission denied"):
        fetch(str(file))


DAMAGES = {
    "empty": lambda content: b"",
    "half a header": lambda content: content[:2000],
    "half the weights": lambda content: content[: len(content) * 2 // 3],
    "one byte short": lambda content: content[:-1],
    "another format": lambda content: b"PK\x03\x04" + content[4:],
    "an unknown version": lambda content: content[:4] + (99).to_bytes(4, "little") + content[8:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, cache, damage):
    file = tiny_file(tmp_path)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    for command in (("fetch", file), ("similarity", "a", "b", "--model", f"mean:{file}")):
        said = cli(*command)
        assert_refused(said, str(file), "cannot be read", READ)
    assert (
        not (cache / "models").exists()
        or [p for p in (cache / "models").iterdir() if p.suffix != ".lock"] == []
    )


def test_what_transformers_cannot_read_is_said(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "vision.gguf", "clip")
    writer.add_name("an image encoder")
    writer.add_tensor("v.weight", torch.zeros(32, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_refused(cli("fetch", tmp_path / "vision.gguf"), "clip", "cannot be read")
    part = tiny_file(tmp_path, split__count=3)
    assert_refused(cli("fetch", part), "one part of several", "--merge")
    # 8 wide heads: a size that the file does tell, and transformers does not read
    narrow = make_lm("qwen3", **WIDE)
    write_gguf(tmp_path / "narrow.gguf", narrow, make_tokenizer(bos=False))
    assert_refused(cli("fetch", tmp_path / "narrow.gguf"), "cannot be read")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.gguf", "no such file"),
        ("owner/model", "nothing to fetch"),
        ("builtin:smollm", "did you mean 'builtin:smollm2'"),
    ],
)
def test_names_that_are_nothing(name, said):
    assert_refused(cli("fetch", name), name, said)
    with pytest.raises(BackboneError):
        fetch(name)


def test_scaled_positions_are_told(tmp_path):
    lm, tokenizer = tiny()
    write_gguf(tmp_path / "x.gguf", lm, tokenizer, scaled=True)
    assert "scaling of positions" in cli("fetch", tmp_path / "x.gguf").err


def test_a_name_that_is_no_card_is_an_unknown_licence(tmp_path):
    assert base_licence(settings(tiny_file(tmp_path, licence=None))) == "unknown"
    assert base_licence(settings(tiny_file(tmp_path, licence="own: 'terms'"))) == "own: 'terms'"


def test_a_language_model_is_no_encoder(tmp_path):
    for name in (tiny_file(tmp_path), "builtin:smollm2", "builtin:tiny"):
        assert_refused(cli("similarity", "a", "b", "--model", name), f"mean:{name}")
