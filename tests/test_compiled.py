"""Compiled graphs embed as torch does: any batch, any length, any weighting, in a process of their
own; else a clear error.
"""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import llm2comp
from families import FAMILIES, MEMORY, MIXTURES, TEXTS, make_compressor, relative_error
from llm2comp.errors import BackboneError, ModelFolderError
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.recipe import EncoderSettings
from llm2comp.storage import compiled, loading, runtimes
from llm2comp.storage.compiled import MIN_COSINE, compile_folder, compiled_of, load_compiled
from llm2comp.storage.export import export
from llm2comp.storage.golden import load_folder, verify
from llm2comp.storage.identity import identity
from llm2comp.storage.reweighting import reweight
from llm2comp.storage.runtimes import RUNTIMES, round_weights
from llm2comp.storage.weights import memory_weights
from llm2comp.system.folders import MARK_FILE
from oracles import embed_texts
from serving import serving
from tiny_run import cli

LIMIT = 60
LONG = "memory tokens hold what the text said; " * 60
READ = [*TEXTS, LONG, "", TEXTS[0], "a"]
# name → family and what is special about the encoder
VARIANTS = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", {}),
    "gpt2": ("gpt2", {}),
    "causal": ("llama", {"attention": "causal"}),
    "one-memory-token": ("llama", {"memory": 1}),
    # no BOS: an empty text has no token at all
    "mean": ("qwen3", {"encoder": EncoderSettings(pooling="mean")}),
    "bfloat16": ("llama", {"dtype": torch.bfloat16}),
    "window": ("mistral-window", {}),
}


def needs(backend):
    missing = RUNTIMES[backend].missing()
    return pytest.mark.skipif(
        bool(missing), reason=f"{', '.join(missing)} not installed (extra `{backend}`)"
    )


backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=needs(name)) for name in RUNTIMES]
)


def write_folder(place, variant):
    family, settings = VARIANTS[variant]
    export(
        as_sentence_transformer(
            make_compressor(family, **settings), LIMIT, prompts={"query": "find: "}
        ),
        place,
    )
    return place


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def folder_of(root):
    """Exported folders, none of them changed by a test."""

    def folder(variant, backend=None, precision="float32"):
        place = root / "-".join(filter(None, (variant, backend, precision)))
        if not place.is_dir():
            if backend is None:
                return write_folder(place, variant)
            shutil.copytree(folder(variant), place)
            compile_folder(place, backend, precision)
        return place

    return folder


@pytest.fixture
def folder(folder_of, tmp_path):
    """A folder with a graph for OpenVINO, to be damaged."""
    return Path(shutil.copytree(folder_of("llama", "openvino"), tmp_path / "model"))


def torch_model(folder):
    return load_folder(folder, "cpu").float()


def close(found, expected, tolerance=1e-5):
    return bool(((found - expected).norm(dim=1) <= tolerance * expected.norm(dim=1)).all())


@needs("openvino")
# as Gemma 3 does
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "window"])
def test_openvino_embeds_as_torch_does(folder_of, variant):
    model, expected = load_compiled(folder_of(variant, "openvino")), torch_model(folder_of(variant))
    want = embed_texts(expected, READ)
    assert (want[:3] - want[1:4]).norm(dim=1).min() > 0.1, "vacuous: all embeddings alike"
    for batch_size in (1, 3, len(READ)):  # one graph for all shapes
        assert close(embed_texts(model, READ, batch_size), want)
        assert close(embed_texts(model, READ[::-1], batch_size).flip(0), want), (
            "mates and order do not matter"
        )
    query = torch.as_tensor(expected.encode_query(READ))
    assert close(torch.as_tensor(model.encode_query(READ)), query)
    assert not close(want, query, 0.1), "vacuous: the prompt does nothing"
    assert model.max_seq_length == expected.max_seq_length
    assert model.get_embedding_dimension() == expected.get_embedding_dimension()
    assert model.device.type == "cpu"


@needs("onnx")
def test_onnx_embeds_as_torch_does(folder_of):
    model, want = (
        load_compiled(folder_of("window", "onnx"), "onnx"),
        embed_texts(torch_model(folder_of("window")), READ),
    )
    for batch_size in (1, 3, len(READ)):
        assert close(embed_texts(model, READ, batch_size), want)


@backends
def test_a_server_of_the_graph_answers_as_torch_does(folder_of, backend):
    folder = folder_of("llama", backend)
    model, expected = llm2comp.load(str(folder), backend=backend), torch_model(folder)
    with serving(model, str(folder), name="ours") as served:
        assert served.client.get("/info").json()["backend"] == backend
        texts = [text for text in READ if text]  # OpenAI's endpoint refuses an empty one
        for options, embed in (
            ({}, expected.encode),
            ({"input_type": "query"}, expected.encode_query),
        ):
            answer = served.embeddings(texts, **options)
            assert answer.status_code == 200, answer.text
            found = torch.tensor([row["embedding"] for row in answer.json()["data"]])
            want = torch.nn.functional.normalize(torch.as_tensor(embed(texts)))
            assert close(torch.nn.functional.normalize(found), want)


def states(model, ids_BT, mask_BT):
    with torch.no_grad():
        return model[0]({"input_ids": ids_BT, "attention_mask": mask_BT})["token_embeddings"]


@needs("openvino")
@pytest.mark.parametrize(
    ("variant", "moves"), [("llama", True), ("gemma3", True), ("gpt2", True), ("causal", False)]
)
def test_the_first_state_sees_the_last_token_only_if_bidirectional(folder_of, variant, moves):
    model = load_compiled(folder_of(variant, "openvino"))
    ids_BT = torch.tensor([[5, 17, 40, 60, 33]])  # within a window of 8
    other = ids_BT.clone()
    other[0, -1] = 99
    mask_BT = torch.ones_like(ids_BT)
    a, b = states(model, ids_BT, mask_BT), states(model, other, mask_BT)
    assert (relative_error(b[:, 0], a[:, 0]) > 1e-3) is moves
    assert relative_error(b[:, -1], a[:, -1]) > 1e-3


@backends
def test_padding_does_not_matter(folder_of, backend):
    """What stands under the mask, and how much of it, is not seen: beyond a sliding window, too."""
    model = load_compiled(folder_of("window", backend), backend)
    ids_BT, mask_BT = torch.tensor([[5, 17, 40, 60]]), torch.ones(1, 4, dtype=torch.int64)
    alone = states(model, ids_BT, mask_BT)
    for token, padding in ((0, 1), (7, 3), (9, 40)):
        wide = torch.cat([ids_BT, torch.full((1, padding), token)], 1)
        found = states(
            model, wide, torch.cat([mask_BT, torch.zeros(1, padding, dtype=torch.int64)], 1)
        )
        assert found.isfinite().all()
        assert relative_error(found[:, :4], alone) < 1e-5


@backends
def test_the_folder_stays_what_it_was_for_torch(folder_of, backend):
    before, after = folder_of("window"), folder_of("window", backend)
    files = {file.relative_to(after).as_posix() for file in after.rglob("*") if file.is_file()}
    old = {file.relative_to(before).as_posix() for file in before.rglob("*") if file.is_file()}
    assert {name.split("/")[0] for name in files - old} == {backend}
    assert all((before / name).read_bytes() == (after / name).read_bytes() for name in old)
    want = embed_texts(SentenceTransformer(str(before), device="cpu"), READ)
    assert torch.equal(embed_texts(SentenceTransformer(str(after), device="cpu"), READ), want)
    assert verify(after) > 0.99999
    plain, graph = llm2comp.load(after), llm2comp.load(after, backend=backend)
    assert compiled_of(plain) is None
    assert compiled_of(graph).precision == "float32"
    assert identity(after, plain).revision == identity(before, llm2comp.load(before)).revision
    assert identity(after, graph).revision != identity(after, plain).revision
    assert identity(after, graph).name == f"{identity(after, plain).name}-{backend}-float32"


@needs("openvino")
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_coarser_precisions_are_near_and_smaller(folder_of, precision):
    fine, coarse = folder_of("llama", "openvino"), folder_of("llama", "openvino", precision)
    want = embed_texts(torch_model(fine), READ)
    found = embed_texts(load_compiled(coarse), READ)
    cosines = torch.cosine_similarity(found, want)
    assert cosines.min() > MIN_COSINE[precision]
    assert not close(found, want, 1e-4), "vacuous: nothing was rounded"
    size = {
        place: (place / "openvino" / "openvino_model.bin").stat().st_size
        for place in (fine, coarse)
    }
    assert size[coarse] < {"bfloat16": 0.55, "int8": 0.35}[precision] * size[fine]


@needs("openvino")
@pytest.mark.parametrize("transposed", [True, False])
def test_rounded_weights_are_those_of_the_formula(transposed):
    import openvino
    from openvino import opset13 as ops

    weights = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    weights[2, :] = weights[:, 3] = 0
    x = ops.parameter([-1, 5 if transposed else 6], np.float32)
    ids = ops.parameter([-1], np.int64)
    table = ops.gather(ops.constant(weights), ids, ops.constant(0))
    graph = openvino.Model(
        [ops.matmul(x, ops.constant(weights), False, transposed), table], [x, ids]
    )
    assert round_weights(graph) == 2

    def rounded(axis):
        scale = np.abs(weights).max(axis, keepdims=True) / 127
        scale[scale == 0] = 1
        return np.round(weights / scale) * scale

    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    inputs = np.eye(5 if transposed else 6, dtype=np.float32)
    product, rows = openvino.compile_model(graph, "CPU", settings)([inputs, np.arange(6)]).values()
    assert np.allclose(product, rounded(1).T if transposed else rounded(0), atol=1e-6)
    assert np.allclose(rows, rounded(1), atol=1e-6)
    assert 1e-3 < np.abs(rows - weights).max() < np.abs(weights).max() / 250


@needs("openvino")
def test_int8_that_embeds_otherwise_is_refused_and_the_old_graph_stays(folder, monkeypatch):
    before = {file: file.read_bytes() for file in sorted((folder / "openvino").iterdir())}
    monkeypatch.setitem(MIN_COSINE, "int8", 1.0)
    with pytest.raises(
        ModelFolderError, match="openvino in int8 does not embed as torch does"
    ) as error:
        compile_folder(folder, "openvino", "int8")
    assert error.value.expected == "cosine ≥ 1.0"
    assert "bfloat16" in error.value.fix
    assert {file: file.read_bytes() for file in sorted((folder / "openvino").iterdir())} == before
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == [MARK_FILE]


@needs("openvino")
def test_a_graph_of_other_weights_is_refused(folder, monkeypatch):
    write = RUNTIMES["openvino"].write

    def forgetful(body, *rest):
        body = copy.deepcopy(body)
        body.layers[1].mlp.down_proj.weight.data.zero_()
        write(body, *rest)

    monkeypatch.setitem(
        RUNTIMES,
        "openvino",
        type(RUNTIMES["openvino"])(**vars(RUNTIMES["openvino"]) | {"write": forgetful}),
    )
    with pytest.raises(ModelFolderError, match="does not embed as torch does"):
        compile_folder(folder)


@needs("openvino")
def test_weights_of_memory_tokens_need_no_new_graph(folder):
    expected = {
        first: embed_texts(llm2comp.load(folder, num_memory=first), READ) for first in (1, 2)
    }
    for first, want in expected.items():
        model = llm2comp.load(folder, num_memory=first, backend="openvino")
        assert close(embed_texts(model, READ), want)
        assert identity(folder, model).name.endswith(f"openvino-float32-last-{first}")
    assert not close(expected[1], expected[2], 1e-2)
    reweight(folder, [0.0, 0.0, 1.0])
    model = llm2comp.load(folder, backend="openvino")
    assert memory_weights(model) == [0.0] * (MEMORY - 1) + [1.0]
    assert close(embed_texts(model, READ), expected[1])


@needs("openvino")
@needs("onnx")
def test_in_a_process_of_its_own_without_the_torch_weights(folder_of, tmp_path):
    for backend in RUNTIMES:
        shutil.copytree(folder_of("window", backend), tmp_path / backend)
        (tmp_path / backend / "model.safetensors").unlink()
    program = """
import json, sys
import torch
torch.set_num_threads(1)
import llm2comp
texts = json.load(sys.stdin)
models = [llm2comp.load(name, backend=name) for name in sys.argv[1:]]
found = [model.encode(texts, batch_size=3).tolist() for model in models]
json.dump(found, sys.stdout)
"""
    command = [sys.executable, "-c", program, *RUNTIMES]
    done = subprocess.run(
        command, input=json.dumps(READ), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    want = embed_texts(torch_model(folder_of("window")), READ)
    for backend, found in zip(RUNTIMES, json.loads(done.stdout), strict=True):
        assert close(torch.tensor(found), want), backend


@needs("openvino")
@pytest.mark.parametrize("name", ["openvino_model.bin", "openvino_model.xml"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "one byte"])
def test_a_damaged_graph_is_one_clear_error(folder, name, damage):
    file = folder / "openvino" / name
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage != "missing":
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "one byte" else content[:-100])
    with pytest.raises(ModelFolderError, match="is missing or damaged") as error:
        llm2comp.load(folder, backend="openvino")
    assert error.value.where == str(file)
    if damage == "missing":
        assert embed_texts(llm2comp.load(folder), TEXTS).isfinite().all(), "torch is not touched"
        assert compile_folder(folder) > MIN_COSINE["float32"]
        assert llm2comp.load(folder, backend="openvino")


@needs("openvino")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no compiled graph"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
    ]
    + [(json.dumps({"format_version": 9, "precision": "int8", "files": {}}), "unknown format")]
    + [(json.dumps({"format_version": 1, "precision": "int4", "files": {}}), "unknown format")],
)
def test_a_damaged_list_of_files(folder, content, message):
    file = folder / "openvino" / compiled.GRAPH_FILE
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(ModelFolderError, match=message):
        llm2comp.load(folder, backend="openvino")


@needs("openvino")
def test_what_has_no_graph(folder_of, tmp_path):
    with pytest.raises(ModelFolderError, match="holds no compiled graph"):
        llm2comp.load(folder_of("llama"), backend="openvino")
    for place in ("builtin:general", tmp_path / "nothing", tmp_path):
        with pytest.raises(ModelFolderError, match="not an exported folder"):
            llm2comp.load(place, backend="openvino")
    with pytest.raises(BackboneError, match="runs on the CPU only"):
        llm2comp.load(folder_of("llama", "openvino"), "cuda", backend="openvino")
    with pytest.raises(NotImplementedError, match="copy the model's folder"):
        load_compiled(folder_of("llama", "openvino")).save(str(tmp_path / "copy"))


@needs("openvino")
def test_what_cannot_be_compiled(tmp_path):
    with pytest.raises(ModelFolderError, match="not a sentence-transformers folder"):
        compile_folder(tmp_path)
    late = tmp_path / "late"
    export(as_sentence_transformer(make_compressor(), LIMIT), late, multi_vector=True)
    with pytest.raises(ModelFolderError, match="holds several vectors per text"):
        compile_folder(late)
    family = min(MIXTURES)
    mixture = tmp_path / family
    export(as_sentence_transformer(make_compressor(family), LIMIT), mixture)
    with pytest.raises(ModelFolderError, match="openvino cannot express this model"):
        compile_folder(mixture)
    assert not (mixture / "openvino").exists()
    assert family in FAMILIES


@pytest.mark.parametrize(
    ("backend", "precision", "message"),
    [
        ("tensorrt", "float32", "no such backend"),
        ("onnx", "int8", "no such precision"),
        ("openvino", "int4", "no such precision"),
    ],
)
def test_unknown_names(tmp_path, backend, precision, message):
    with pytest.raises(ModelFolderError, match=message):
        compile_folder(tmp_path, backend, precision)


@pytest.mark.parametrize("backend", RUNTIMES)
def test_without_the_extra_the_error_names_it(tmp_path, backend, monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    for call in (
        lambda: compile_folder(tmp_path, backend),
        lambda: llm2comp.load(tmp_path, backend=backend),
    ):
        with pytest.raises(ModelFolderError, match="is not installed") as error:
            call()
        assert f"[{backend}]'" in str(error.value)


@needs("openvino")
def test_command_line(tmp_path, monkeypatch):
    out = tmp_path / "model"
    with monkeypatch.context() as patch:  # in the place of a run, which would take its time
        patch.setattr(loading, "load", lambda *_: as_sentence_transformer(make_compressor(), LIMIT))
        said = cli("export", out, "-m", "a-run", "--openvino", "int8")
    assert said.code == 0, said.err
    assert "int8, lowest cosine 0.99" in said.err
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    for backend in ("torch", "openvino"):
        said = cli(
            "embed",
            tmp_path / "texts.txt",
            "-m",
            out,
            "-o",
            tmp_path / f"{backend}.npy",
            "--backend",
            backend,
        )
        assert said.code == 0, said.err
    a, b = (
        torch.from_numpy(np.load(tmp_path / f"{backend}.npy")) for backend in ("torch", "openvino")
    )
    assert MIN_COSINE["int8"] < torch.cosine_similarity(a, b).min() < 0.999999
