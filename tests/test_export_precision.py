"""Half precision and export: the folder is held against the native encoder in float32, and what
half precision does is told.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from families import TEXTS, make_backbone, make_compressor, snapshot
from llm2comp.errors import ModelFolderError
from llm2comp.model.backbone.quantized import in_float32
from llm2comp.model.compressor import Compressor
from llm2comp.model.encoder import as_sentence_transformer
from llm2comp.recipe import AdapterSettings, EncoderSettings
from llm2comp.storage import stock
from llm2comp.storage.export import export
from llm2comp.storage.golden import GOLDEN_TEXTS, verify
from llm2comp.storage.reweighting import reweight
from oracles import embed_texts
from tiny_run import assert_refused, cli, finished

# A tiny LM in which rounding grows from layer to layer, as real ones do under an attention that
# they were not made for.
ROUGH = {"initializer_range": 0.6, "num_hidden_layers": 8}


def rough(dtype=torch.bfloat16, kind="lora", **settings):
    """A live encoder over such an LM, memory states large as those of texts."""
    if kind == "lora":
        compressor = make_compressor("llama", dtype=dtype, **ROUGH, **settings)
    else:
        backbone = make_backbone("llama", dtype=dtype, **ROUGH)
        compressor = Compressor.fresh(backbone, 3, seed=3)
        backbone.add_adapter("pretext", AdapterSettings(kind=kind))
        for parameter in backbone.adapters.parameters("pretext"):
            parameter.data += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(4)
            )
        compressor.eval()
    return as_sentence_transformer(compressor, 40)


def cosine(found, expected):
    return torch.cosine_similarity(found, expected).min().item()


def in_32(model):
    with in_float32(model[0]):
        return embed_texts(model, list(GOLDEN_TEXTS))


def golden_of(folder):
    return json.loads((folder / "golden.json").read_text())


VARIANTS = {
    "bfloat16": (torch.bfloat16, {}),
    "mean": (torch.bfloat16, {"encoder": EncoderSettings(pooling="mean")}),
    "full": (torch.bfloat16, {"kind": "full"}),
    "none": (torch.bfloat16, {"kind": "none"}),
}


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sound_export_is_written_however_far_half_precision_drifts(tmp_path, variant):
    dtype, settings = VARIANTS[variant]
    model = rough(dtype, **settings)
    exact, own = in_32(model), embed_texts(model, list(GOLDEN_TEXTS))
    assert (cosine(own, exact) < 0.995) == (variant != "full"), (
        "a full copy computes in float32; else: vacuous"
    )
    export(model, tmp_path / "model")
    golden = golden_of(tmp_path / "model")
    figures = golden["precision"]
    assert figures["dtype"] == "bfloat16"
    kept = SentenceTransformer(
        str(tmp_path / "model"), device="cpu", model_kwargs={"dtype": "float32"}
    )
    found = embed_texts(kept, list(GOLDEN_TEXTS))
    assert cosine(torch.tensor(golden["embeddings"]), found) > 0.999999
    assert figures["weights"] == pytest.approx(cosine(found, exact), abs=1e-5)
    half = embed_texts(
        SentenceTransformer(str(tmp_path / "model"), device="cpu"), list(GOLDEN_TEXTS)
    )
    assert figures["computing"] == pytest.approx(cosine(half, found), abs=1e-3)
    assert figures["computing"] < 0.995
    assert f"{figures['computing']:.5f}" in (tmp_path / "model" / "README.md").read_text()
    assert verify(tmp_path / "model") > 0.99999


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_can_be_asked_for(tmp_path, dtype, capsys):
    model = rough()
    exact = in_32(model)
    export(model, tmp_path / "model", dtype=dtype)
    assert {
        str(tensor.dtype) for tensor in load_file(tmp_path / "model" / "model.safetensors").values()
    } == {f"torch.{dtype}"}
    kept = SentenceTransformer(
        str(tmp_path / "model"), device="cpu", model_kwargs={"dtype": "float32"}
    )
    weights = golden_of(tmp_path / "model")["precision"]["weights"]
    assert weights == pytest.approx(cosine(embed_texts(kept, list(GOLDEN_TEXTS)), exact), abs=1e-5)
    assert weights > (0.99999 if dtype == "float32" else 0.999), "finer than bfloat16"
    assert verify(tmp_path / "model") > 0.99999
    with pytest.raises(ModelFolderError, match="no such dtype"):
        export(model, tmp_path / "other", dtype="int8")
    assert not (tmp_path / "other").exists()


def test_what_drifts_far_is_told(tmp_path, capsys):
    export(rough(), tmp_path / "model")
    said = capsys.readouterr()
    assert ("computed in bfloat16" in said.out + said.err) == (
        golden_of(tmp_path / "model")["precision"]["computing"] < 0.99
    )
    export(rough(), tmp_path / "model", dtype="float32")
    said = capsys.readouterr()
    assert "computed in" not in said.out + said.err


def test_the_live_encoder_gets_its_own_bits_back(tmp_path):
    for model in (rough(), rough(torch.float16), rough(kind="full")):
        before, embeddings = snapshot(model), embed_texts(model, TEXTS)
        with in_float32(model[0]):
            assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        with pytest.raises(RuntimeError, match="in between"), in_float32(model[0]):
            raise RuntimeError("in between")
        after = snapshot(model)
        assert after.keys() == before.keys()
        assert all(
            torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype
            for name, tensor in before.items()
        )
        assert torch.equal(embed_texts(model, TEXTS), embeddings)


def test_an_unsound_export_is_found_although_half_precision_would_hide_it(tmp_path, monkeypatch):
    """A change smaller than what bfloat16 does by itself."""
    model = rough()
    write = stock._write_transformer

    def changed(module, folder):
        memory = module.compressor.memory.vectors_KD
        before = memory.data.clone()
        memory.data *= 1 + 0.03 * torch.randn(
            memory.shape, generator=torch.Generator().manual_seed(5)
        )
        try:
            return write(module, folder)
        finally:
            memory.data = before

    monkeypatch.setattr(stock, "_write_transformer", changed)
    with pytest.raises(ModelFolderError, match="in float32"):
        export(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_other_weights_renew_the_figure(tmp_path):
    export(rough(), tmp_path / "model")
    before = golden_of(tmp_path / "model")["precision"]
    reweight(tmp_path / "model", [1.0, 0.0, 0.0])
    after = golden_of(tmp_path / "model")["precision"]
    assert after["computing"] != before["computing"]
    assert after["weights"] == before["weights"], (
        "not measured anew: the trained encoder is not at hand"
    )
    assert verify(tmp_path / "model") > 0.99999


def test_a_folder_without_the_figure_is_verified_as_before(tmp_path):
    """Of an earlier version, whose bound was wider: its golden vectors are float32, too."""
    export(rough(), tmp_path / "model")
    golden = golden_of(tmp_path / "model")
    del golden["precision"]
    (tmp_path / "model" / "golden.json").write_text(json.dumps(golden | {"minimum_cosine": 0.999}))
    assert verify(tmp_path / "model") > 0.99999


def test_on_the_command_line(tmp_path):
    run = finished()[1]
    said = cli("export", tmp_path / "half", "--model", run, "--dtype", "bfloat16")
    assert said.code == 0, said.err
    assert golden_of(tmp_path / "half")["precision"]["dtype"] == "bfloat16"
    assert cli("verify", tmp_path / "half").code == 0
    assert_refused(cli("verify", run / "3-scl"), "golden.json")
    assert cli("verify", run).code == 0, "a run: its model/"
