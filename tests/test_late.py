"""Late interaction: memory states as a text's vectors, scored by MaxSim; live, and in a stock
folder without this package.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from sentence_transformers import MultiVectorEncoder

from families import MEMORY, TEXTS, make_compressor
from llm2comp.errors import ModelFolderError
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.model.memory import maxsim
from llm2comp.model.tokens import Tokens
from llm2comp.model.vectors import memory_vectors
from llm2comp.recipe import EncoderSettings
from llm2comp.storage.export import export
from llm2comp.storage.golden import GOLDEN_TEXTS, load_folder, verify
from test_export import USER

LIMIT = 40
QUERIES = ["who reads", "what is kept", ""]
DOCUMENTS = [*TEXTS, "memory tokens hold what the text said; " * 60, GOLDEN_TEXTS[1]]
PROMPTS = {"query": "find: ", "document": ""}
VARIANTS = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", {}),
    "causal": ("llama", {"attention": "causal"}),
    "one-memory-token": ("llama", {"memory": 1}),
}
# The user's side: everything but the lines that load and encode is as for single vectors.
START, _ = USER.split("from sentence_transformers import")
LATE_USER = (
    START
    + """
from sentence_transformers import MultiVectorEncoder

given, found = json.load(sys.stdin), {}
for folder in sys.argv[1:]:
    model = MultiVectorEncoder(folder)
    queries = model.encode_query(given["queries"], batch_size=2)
    documents = model.encode_document(given["documents"], batch_size=3)
    plain = model.encode(given["documents"])
    found[folder] = {
        "queries": torch.stack(queries).tolist(),
        "documents": torch.stack(documents).tolist(),
        "plain": torch.stack(plain).tolist(),
        "scores": model.similarity(queries, documents).tolist(),
    }
assert not any(name.split(".")[0] == "llm2comp" for name in sys.modules)
json.dump(found, sys.stdout)
"""
)


def make_model(variant):
    family, settings = VARIANTS[variant]
    return as_sentence_transformer(make_compressor(family, **settings), LIMIT, prompts=PROMPTS)


def naive_maxsim(query_KD, document_KD):
    return sum(max(torch.dot(q, d).item() for d in document_KD) for q in query_KD)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("late")
    for variant in VARIANTS:
        export(make_model(variant), root / variant, multi_vector=True)
    folders = [str(root / variant) for variant in VARIANTS]
    given = json.dumps({"queries": QUERIES, "documents": DOCUMENTS})
    command = [sys.executable, "-c", LATE_USER, *folders]
    user = subprocess.run(
        command, input=given, capture_output=True, text=True, check=False, cwd=root
    )
    assert user.returncode == 0, user.stderr[-3000:]
    found = json.loads(user.stdout)
    return root, {variant: found[str(root / variant)] for variant in VARIANTS}


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stock_multi_vector_folder_scores_as_maxsim_of_the_memory_states(exported, variant):
    model, found = (
        make_model(variant),
        {key: torch.tensor(value) for key, value in exported[1][variant].items()},
    )
    compressor = model[0].compressor
    rows = compressor.backbone.tokenise([PROMPTS["query"] + text for text in QUERIES], LIMIT)
    with torch.no_grad():
        states = torch.cat([compressor.memory_states(Tokens.pad([row], "left")) for row in rows])
    queries = states / states.norm(dim=-1, keepdim=True)
    documents = memory_vectors(model, DOCUMENTS, "document", max_tokens_per_batch=40)
    assert found["queries"].shape == (len(QUERIES), compressor.memory.count, 32), (
        "as many vectors for any text"
    )
    assert (found["queries"] - queries).abs().max() < 1e-5
    assert (memory_vectors(model, QUERIES, "query") - queries).abs().max() < 1e-5
    assert (found["documents"] - documents).abs().max() < 1e-5
    assert (found["plain"] - documents).abs().max() < 1e-5
    expected = torch.tensor(
        [[naive_maxsim(query, document) for document in documents] for query in queries]
    )
    assert expected.std() > 0.05, "vacuous: all scores alike"
    assert (found["scores"] - expected).abs().max() < 1e-4
    assert (maxsim(queries, documents) - expected).abs().max() < 1e-4
    if compressor.memory.count > 1:
        mean = queries.mean(1) @ documents.mean(1).T
        assert (mean - expected).abs().max() > 0.05, "not what single vectors give"


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS)
def test_verify_recomputes_many_vectors_too(exported, variant):
    assert verify(exported[0] / variant) > 0.99999


@pytest.mark.thorough
@pytest.mark.parametrize("scored", ["<s>", "C"])
def test_verify_finds_a_token_too_many(exported, tmp_path, scored):
    """In all texts, or in some."""
    folder = shutil.copytree(exported[0] / "llama", tmp_path / "model")
    (config,) = folder.glob("*MultiVectorMask/config.json")
    settings = json.loads(config.read_text())
    settings["skiplist_words"].remove(scored)
    config.write_text(json.dumps(settings))
    with pytest.raises(ModelFolderError, match="embeddings of another shape"):
        verify(folder)


@pytest.mark.thorough
def test_such_a_folder_is_not_taken_for_one_of_single_vectors(exported):
    folder = exported[0] / "llama"
    with pytest.raises(ModelFolderError, match="holds several vectors per text") as caught:
        load_folder(folder)
    assert "MultiVectorEncoder" in str(caught.value)
    card = (folder / "README.md").read_text()
    assert "MultiVectorEncoder(" in card
    assert "MaxSim" in card
    assert len(MultiVectorEncoder(str(folder)).encode("a text")) == MEMORY


def test_without_memory_tokens_there_is_nothing_to_score(tmp_path):
    model = as_sentence_transformer(make_compressor(encoder=EncoderSettings(pooling="mean")), LIMIT)
    with pytest.raises(ModelFolderError, match="has no memory states"):
        memory_vectors(model, TEXTS)
    with pytest.raises(ModelFolderError, match="has no memory states"):
        export(model, tmp_path / "model", multi_vector=True)
    assert list(tmp_path.iterdir()) == []
