"""The exported folder embeds as the native encoder does: in a process of its own that cannot import
this package.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from families import FAMILIES, MEMORY, TEXTS, TOKENS, make_compressor, relative_error, snapshot
from llm2comp.errors import ModelFolderError
from llm2comp.lab import analyze
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.memory import prefix_weights
from llm2comp.model.tokens import Tokens
from llm2comp.recipe import EncoderSettings
from llm2comp.storage import stock
from llm2comp.storage.export import export
from llm2comp.storage.golden import GOLDEN_TEXTS, load_folder, verify
from llm2comp.storage.reweighting import reweight
from llm2comp.storage.weights import memory_ids, memory_names
from oracles import embed_texts

LIMIT = 40
LONG = "memory tokens hold what the text said; " * 60
READ = [*TEXTS, LONG, "", GOLDEN_TEXTS[1], TEXTS[0]]
PROMPTS = {"query": "find: ", "document": ""}

PROMPT = EncoderSettings(pooling="last_token", prompt='the memory "{text}" means in one word: ')

# name → family and what is special about the encoder
VARIANTS = {family: (family, {}) for family in FAMILIES} | {
    "causal": ("llama", {"attention": "causal"}),
    "chat": ("llama", {"chat": True}),
    "chat-no-bos": ("qwen3", {"chat": True}),
    "full-table": ("llama", {"vocab_size": TOKENS}),
    "full-tied-table": ("qwen2", {"vocab_size": TOKENS}),
    "eager": ("mistral-window", {"attn_implementation": "eager"}),
    "bfloat16": ("llama", {"dtype": torch.bfloat16}),
    "bfloat16-scaled": ("gemma3", {"dtype": torch.bfloat16}),
    "own-embeddings": ("gemma3", {}),
    "weighted": ("qwen3", {}),
    "one-memory-token": ("llama", {"memory": 1}),
    "many-memory-tokens": ("llama", {"memory": 64}),
    "mean": ("llama", {"encoder": EncoderSettings(pooling="mean")}),
    "mean-no-bos": ("qwen3", {"encoder": EncoderSettings(pooling="mean")}),
    "last-token": ("gpt_neox", {"encoder": PROMPT, "attention": "causal"}),
    "last-token-no-bos": ("qwen3", {"encoder": PROMPT}),
    "llama-tokenizer": ("llama", {"own": True}),
    "qwen2-tokenizer": ("qwen2", {"own": True}),
    "gemma3-tokenizer": ("gemma3", {"own": True}),
    "gpt2-tokenizer": ("gpt2", {"own": True}),
}

OWN_TOKENIZER = [variant for variant in VARIANTS if variant.endswith("-tokenizer")]

# The user's side, without this package. argv: the folders; standard input: texts; standard output:
# embeddings per folder.
USER = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llm2comp":
            raise ModuleNotFoundError("llm2comp is not here")

sys.meta_path.insert(0, Blocker())
try:
    import llm2comp
except ModuleNotFoundError:
    pass
else:
    sys.exit("llm2comp can be imported here: the test would prove nothing")

import torch
torch.set_num_threads(1)
from sentence_transformers import SentenceTransformer

texts, found = json.load(sys.stdin), {}
for folder in sys.argv[1:]:
    model = SentenceTransformer(folder)
    roles = {"plain": model.encode, "query": model.encode_query, "document": model.encode_document}
    rows = {role: encode(texts, batch_size=3) for role, encode in roles.items()}
    found[folder] = {role: row.astype(float).tolist() for role, row in rows.items()}
assert not any(name.split(".")[0] == "llm2comp" for name in sys.modules)
json.dump(found, sys.stdout)
"""


def make_model(variant):
    family, settings = VARIANTS[variant]
    compressor = make_compressor(family, **settings)
    if variant == "own-embeddings":
        compressor.learn(memory=True, embeddings=True)
        noise = torch.randn(
            compressor.input_table.weight.shape, generator=torch.Generator().manual_seed(2)
        )
        compressor.input_table.weight.data += 0.1 * noise
    if variant == "weighted":
        compressor.get_buffer("weights_K").copy_(torch.tensor([0.6, 0.0, 0.4]))
    return as_sentence_transformer(compressor, LIMIT, prompts=PROMPTS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder per variant, and what the user's process makes of it."""
    root = tmp_path_factory.mktemp("exported")
    for variant in VARIANTS:
        export(make_model(variant), root / variant)
    folders = [str(root / variant) for variant in VARIANTS]
    command = [sys.executable, "-c", USER, *folders]
    user = subprocess.run(
        command, input=json.dumps(READ), capture_output=True, text=True, check=False, cwd=root
    )
    assert user.returncode == 0, user.stderr[-3000:]
    found = json.loads(user.stdout)
    return root, {variant: found[str(root / variant)] for variant in VARIANTS}


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_equals_native_without_this_package(exported, variant):
    model = make_model(variant)
    with torch.no_grad():
        native = {
            "plain": embed_texts(model, READ),
            "query": model.encode_query(READ, convert_to_tensor=True).float(),
            "document": embed_texts(model, READ),
        }
    assert (native["plain"][:3] - native["plain"][1:4]).norm(dim=1).min() > 0.1, (
        "vacuous: all embeddings alike"
    )
    assert (native["plain"] - native["query"])[0].norm() > 0.1, "vacuous: the prompt does nothing"
    for role, expected in native.items():
        found = torch.tensor(exported[1][variant][role])
        if "bfloat16" in variant:
            assert torch.cosine_similarity(found, expected).min() > 0.99, role
        else:
            norms = expected.norm(dim=1)
            assert (norms == 0).tolist() == [
                variant == "mean-no-bos" and role != "query" and not text for text in READ
            ]
            assert ((found - expected).abs().amax(1) / norms.clamp_min(1e-6)).max() < 1e-5, role


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS)
def test_verify_passes(exported, variant):
    assert verify(exported[0] / variant) > (0.999 if "bfloat16" in variant else 0.99999)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "variant", ["llama", "qwen3", "gemma3", "gpt2", "full-table", "chat", *OWN_TOKENIZER]
)
def test_truncation_keeps_bos_and_all_memory_tokens(exported, variant):
    model = SentenceTransformer(str(exported[0] / variant))
    native = make_model(variant)[0].compressor.backbone
    assert memory_names(model) == [f"<mem_{i}>" for i in range(MEMORY)]
    memory = list(memory_ids(model).values())
    assert model.max_seq_length == LIMIT + MEMORY
    features = model.preprocess([LONG, TEXTS[0], ""])
    for text, ids, mask in zip(
        (LONG, TEXTS[0], ""), features["input_ids"], features["attention_mask"], strict=True
    ):
        assert ids[mask.bool()].tolist() == native.tokenise([text], LIMIT)[0] + memory
        assert mask.tolist() == sorted(mask.tolist(), reverse=True), "padded on the right"
    assert features["attention_mask"].sum(1)[0] == LIMIT + MEMORY
    cut = native.tokenise([LONG], LIMIT)[0]
    alone = make_model(variant)[0].compressor(Tokens.pad([cut], "left"))
    assert relative_error(embed_texts(model, [LONG]), alone.detach()) < 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_gets_the_id_of_a_memory_token(exported, variant):
    """Some families' own classes add tokens when they load a folder."""
    model = SentenceTransformer(str(exported[0] / variant))
    native = make_model(variant)[0].tokenizer
    assert len(model.tokenizer) == len(native)
    read = model.tokenizer("a <|endoftext|> <unk> <s> b", add_special_tokens=False)["input_ids"]
    assert not set(read) & set(memory_ids(model).values())


@pytest.mark.thorough
def test_exported_embedding_does_not_depend_on_mates_or_order(exported):
    for variant in ("llama", "qwen3", "gemma3", "mistral-window"):
        model = SentenceTransformer(str(exported[0] / variant))
        alone = embed_texts(model, READ, batch_size=1)
        assert (embed_texts(model, READ) - alone).abs().max() < 1e-5
        assert (embed_texts(model, READ[::-1], batch_size=2).flip(0) - alone).abs().max() < 1e-5


@pytest.mark.thorough
def test_a_chat_template_is_gone_and_changes_nothing(exported):
    root, found = exported
    assert found["chat"] == found["llama"]
    assert found["chat-no-bos"] == found["qwen3"]
    for variant in ("chat", "chat-no-bos", *OWN_TOKENIZER):
        assert make_model(variant)[0].tokenizer.chat_template
        assert not list((root / variant).rglob("*.jinja"))
        assert SentenceTransformer(str(root / variant)).tokenizer.chat_template is None
        assert "chat_template" not in (root / variant / "tokenizer_config.json").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize("variant", ["llama", "qwen2", "gemma3", "gpt2", "causal"])
def test_transformers_alone_gives_the_memory_states(exported, variant):
    """The folder is an ordinary model and tokenizer: AutoModel's last states are the native memory
    states.
    """
    folder = exported[0] / variant
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    compressor = make_model(variant)[0].compressor
    assert getattr(lm.config, "is_causal", True) is (variant == "causal")
    for text in TEXTS:
        expected = compressor.memory_states(
            Tokens.pad(compressor.backbone.tokenise([text]), "left")
        )[0]
        with torch.no_grad():
            found = lm(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -MEMORY:]
        assert (found - expected).abs().max() < 1e-5


def test_the_live_encoder_is_as_it_was(tmp_path):
    model = make_model("own-embeddings")
    before, embeddings = snapshot(model), embed_texts(model, READ)
    tokenizer = model[0].tokenizer
    vocabulary, template = tokenizer.get_vocab(), tokenizer.backend_tokenizer.to_str()
    export(model, tmp_path / "model")
    after = snapshot(model)
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(embed_texts(model, READ), embeddings)
    assert (tokenizer.get_vocab(), tokenizer.backend_tokenizer.to_str()) == (vocabulary, template)
    assert not getattr(model[0].compressor.backbone.config, "use_bidirectional_attention", False)
    assert getattr(model[0].compressor.backbone.config, "is_causal", None) is not False
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.thorough
def test_folder_holds_stock_modules_and_no_code(exported):
    folder = exported[0] / "llama"
    modules = json.loads((folder / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert not list(folder.rglob("*.py"))
    assert "auto_map" not in (folder / "config.json").read_text()
    weights = load_file(folder / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "lm_head" in name]


@pytest.mark.thorough
def test_an_exported_folder_is_not_exported_again(exported, tmp_path):
    with pytest.raises(ModelFolderError, match="is exported already"):
        export(load_folder(exported[0] / "llama"), tmp_path / "again")


def test_an_export_that_embeds_otherwise_leaves_the_old_folder(tmp_path, monkeypatch):
    model = make_model("llama")
    export(model, tmp_path / "model")
    before = {
        path: path.read_bytes()
        for path in sorted((tmp_path / "model").rglob("*"))
        if path.is_file()
    }
    write = stock._write_transformer

    def forgetful(module, folder):
        """Without the newest adapter."""
        module.compressor.backbone.adapters.names.pop()
        return write(module, folder)

    monkeypatch.setattr(stock, "_write_transformer", forgetful)
    with pytest.raises(ModelFolderError, match="does not embed as the native encoder"):
        export(model, tmp_path / "model")
    assert {
        path: path.read_bytes()
        for path in sorted((tmp_path / "model").rglob("*"))
        if path.is_file()
    } == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported[0] / "llama", tmp_path / "model")


@pytest.mark.thorough
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_verify_finds_a_truncated_weights_file(folder, share):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelFolderError, match="cannot be loaded"):
        verify(folder)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["layers.1.mlp.down_proj.weight", "embed_tokens.weight"])
def test_verify_finds_changed_weights(folder, name):
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name] + 0.05 * torch.randn(
        weights[name].shape, generator=torch.Generator().manual_seed(0)
    )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match="gives other embeddings"):
        verify(folder)


@pytest.mark.thorough
def test_verify_finds_a_changed_template_and_attention(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["is_causal"] is False
    changed = config | {"is_causal": True, "use_bidirectional_attention": False}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelFolderError, match="gives other embeddings"):
        verify(folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert verify(folder) > 0.99999
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"]["single"].pop(0)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelFolderError, match="gives other embeddings"):
        verify(folder)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("golden.json", "is not there: nothing to hold the folder against"),
        ("modules.json", "not a sentence-transformers folder"),
        ("model.safetensors", "cannot be loaded"),
        ("config.json", "cannot be loaded"),
    ],
)
def test_verify_finds_a_missing_file(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(ModelFolderError, match=message):
        verify(folder)
    with pytest.raises(ModelFolderError, match="cannot be checked"):
        verify(folder / "nowhere")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("key", "value"), [("format_version", 99), ("embeddings", [[1.0, 2.0]]), ("texts", None)]
)
def test_verify_refuses_a_golden_file_of_another_kind(folder, key, value):
    golden = json.loads((folder / "golden.json").read_text())
    (folder / "golden.json").write_text(json.dumps(golden | {key: value}))
    with pytest.raises(ModelFolderError):
        verify(folder)


def live_states(model):
    """Memory states of READ, memory_NKD."""
    module = model[0]
    with torch.no_grad():
        return module.compressor.memory_states(
            Tokens(*(module.preprocess(READ)[key] for key in ("input_ids", "attention_mask")))
        )


WEIGHTINGS = {
    "mean": [1 / 3, 1 / 3, 1 / 3],
    "first": prefix_weights(MEMORY, 1, "first").tolist(),
    "first two": prefix_weights(MEMORY, 2, "first").tolist(),
    "two clusters": [0.25, 0.5, 0.25],
}


@pytest.mark.thorough
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_any_weighting_can_be_written_into_a_folder(folder, weighting):
    weights = WEIGHTINGS[weighting]
    states = live_states(make_model("llama"))
    before = embed_texts(load_folder(folder), READ)
    reweight(folder, weights)
    assert verify(folder) > 0.99999, "the golden vectors are the new ones"
    found = embed_texts(SentenceTransformer(str(folder), device="cpu"), READ)
    assert relative_error(found, torch.einsum("nkd,k->nd", states, torch.tensor(weights))) < 1e-5
    assert (relative_error(found, before) < 1e-5) == (weighting == "mean")


@pytest.mark.thorough
def test_one_memory_token_has_no_weights_to_change_but_is_found(exported, tmp_path):
    folder = shutil.copytree(exported[0] / "one-memory-token", tmp_path / "model")
    assert memory_names(load_folder(folder)) == ["<mem_0>"]
    found = analyze._memory(load_folder(folder), None, READ)
    assert relative_error(found, live_states(make_model("one-memory-token"))) < 1e-5
    with pytest.raises(ModelFolderError, match="cannot be given weights"):
        reweight(folder, [1.0])
    assert verify(folder) > 0.99999
    with pytest.raises(ModelFolderError, match="cannot be given weights"):
        reweight(shutil.copytree(exported[0] / "mean", tmp_path / "mean"), [1.0])
