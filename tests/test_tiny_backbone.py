"""tools/: data step and training of the embedded backbone, on a corpus and a model made here."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm2comp.model.backbone.loading import load_backbone
from llm2comp.recipe import ModelSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import backbone_data
import backbone_store
import backbone_text
import backbone_training
import train_tiny_backbone
from backbone_card import perplexity_per_word

HELD_OUT = "The lighthouse keeper counted forty two ships before the fog rolled in and hid the bay."
EVALUATION = "A man is quietly playing the old guitar on a stage."
SIZES = [
    "--hidden=32",
    "--intermediate=64",
    "--layers=2",
    "--heads=2",
    "--context=32",
    "--batch-tokens=256",
    "--no-compile",
]
SIZES += ["--device=cpu", "--peak-tflops=0.1"]
WORDS = (
    "river",
    "stone",
    "carries",
    "cold",
    "water",
    "under",
    "bridge",
    "while",
    "birds",
    "watch",
    "small",
    "boats",
    "drift",
)


def paragraph(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, 30)) + "."


def write_rows(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(zstandard.compress(text.encode()) if path.suffix == ".zst" else text.encode())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two corpora: in `plain`, each document holds a paragraph that must go; in `other`, two of
    three repeat `plain`.
    """
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    repeated = paragraph(rng)
    plain = []
    for i in range(60):
        banned = (
            repeated.upper(),
            f"{i} of them said: “{EVALUATION.upper()}” Then they left.",
            HELD_OUT,
        )[i % 3]
        text = "\n\n".join([paragraph(rng), paragraph(rng), banned])
        plain.append({"id": str(i), "source": "a", "license": "CC0", "text": text})
    plain.insert(
        0,
        {
            "id": "first",
            "source": "a",
            "license": "CC0",
            "text": "\n\n".join([repeated, paragraph(rng)]),
        },
    )
    again = [{**row, "source": "b", "license": "CC-BY-SA-4.0"} for row in plain[:40]]
    again += [
        {**again[0], "text": "\n\n".join([paragraph(rng), paragraph(rng)])} for _ in range(20)
    ]
    write_rows(folder / "plain.jsonl.zst", plain)
    write_rows(folder / "other.jsonl.zst", again)
    held = [
        {"source": f"h{i % 2}", "license": "CC0", "text": f"{HELD_OUT}\n\n{paragraph(rng)}"}
        for i in range(5)
    ]
    write_rows(folder / "heldout.jsonl", held)
    write_rows(
        folder / "evaluation.jsonl", [{"pair": [EVALUATION, "too short to count"], "score": 3.5}]
    )
    return folder


def make_data(corpus: Path, out: Path, *more: str) -> Path:
    options = [
        "--characters",
        "1000000",
        "--vocab",
        "300",
        "--exclude",
        str(corpus / "evaluation.jsonl"),
        *more,
    ]
    backbone_data.main(
        ["--corpus", str(corpus), "--out", str(out), "--shares", "plain=1", "other=1", *options]
    )
    return out


@pytest.fixture(scope="module")
def data(corpus: Path, tmp_path_factory) -> Path:
    return make_data(corpus, tmp_path_factory.mktemp("data") / "data")


def train(data: Path, out: Path, *more: str) -> Path:
    train_tiny_backbone.main(["--data", str(data), "--out", str(out), *SIZES, *more])
    return out


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory) -> Path:
    return train(
        data, tmp_path_factory.mktemp("model") / "tiny", "--budget-tokens", "60000", "--lr", "0.02"
    )


# ---- data


def test_data_holds_what_it_should(corpus: Path, data: Path):
    about = json.loads((data / "data.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    stream = np.fromfile(data / "tokens.bin", dtype=np.uint16)
    documents = [d.strip() for d in tokenizer.decode(stream).split("<s>") if d.strip()]
    paragraphs = [p for d in documents for p in d.split("\n\n")]
    rows = [
        row
        for name in ("plain", "other")
        for row in backbone_text.read_corpus(corpus / f"{name}.jsonl.zst")
    ]
    source = [p for row in rows for p in row["text"].split("\n\n")]
    held = {
        p
        for row in backbone_text.read_corpus(corpus / "heldout.jsonl")
        for p in row["text"].split("\n\n")
    }
    wanted = {
        p
        for p in source
        if p not in held and EVALUATION.lower() not in p.lower() and not p.isupper()
    }
    assert sorted(paragraphs) == sorted(wanted)
    assert (
        about["dropped_paragraphs"]["excluded"]
        == about["dropped_paragraphs"]["held out"] - 13
        == 20
    )
    assert sum(about["dropped_paragraphs"].values()) == len(source) - len(wanted)
    assert (
        about["tokens"] == len(stream) == sum(part["tokens"] for part in about["sources"].values())
    )
    assert np.count_nonzero(stream == about["ids"]["bos"]) == len(documents)
    assert sum(part["documents"] for part in about["sources"].values()) == len(documents) == 61 + 20
    assert about["sources"]["other"]["licences"] == {"b": "CC-BY-SA-4.0"}
    told = (
        "--corpus DIR --out DIR --characters 1000000 --shares plain=1.0 other=1.0 --exclude "
        "FILES --vocab 300"
    )
    assert about["command"] == f"python tools/backbone_data.py {told}"


def test_data_is_deterministic_and_seeded(corpus: Path, data: Path, tmp_path: Path):
    again, other = (
        make_data(corpus, tmp_path / "again"),
        make_data(corpus, tmp_path / "other", "--seed", "1"),
    )
    digests = [json.loads((folder / "data.json").read_text()) for folder in (data, again, other)]
    assert digests[0] == digests[1]
    assert digests[0]["sha256"]["tokens.bin"] != digests[2]["sha256"]["tokens.bin"]
    streams = [np.fromfile(folder / "tokens.bin", dtype=np.uint16) for folder in (data, other)]
    assert (np.bincount(streams[0]) == np.bincount(streams[1])).all(), (
        "another order, the same documents"
    )


def test_characters_and_shares_bound_each_corpus(corpus: Path, tmp_path: Path):
    data = make_data(
        corpus, tmp_path / "data", "--characters", "10000", "--shares", "plain=0.4", "other=0.2"
    )
    about = json.loads((data / "data.json").read_text())
    longest = 3 * 250
    assert 4000 <= about["sources"]["plain"]["characters"] < 4000 + longest
    assert 2000 <= about["sources"]["other"]["characters"] < 2000 + longest


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (f"Before. {EVALUATION} After.", True),
        ("a  MAN is\nquietly, playing the old guitar on a stage", True),
        ("A man is quietly playing the old guitar on a stagecoach.", False),
        ("A man is quietly playing the old guitar.", False),
        ("Supercalifragilistic, expialidocious", True),
        ("", False),
    ],
)
def test_excluded_texts_are_found_by_words(text: str, inside: bool):
    excluded = backbone_text.Excluded(
        [EVALUATION, "supercalifragilistic expialidocious", "----------"]
    )
    assert len(excluded) == 2
    assert excluded.inside(text) is inside


def test_packing_round_trip(corpus: Path, data: Path, tmp_path: Path):
    packed = make_data(corpus, tmp_path / "packed", "--pack", "0.001")
    shards = sorted(packed.glob("tokens.xz.*"))
    content = (packed / "tokens.bin").read_bytes()
    assert len(shards) >= 3
    assert max(shard.stat().st_size for shard in shards) <= 0.001 * 2**20
    assert sum(shard.stat().st_size for shard in shards) < len(content)
    (packed / "tokens.bin").unlink()
    assert (
        backbone_store.open_data(packed).tokens_N.tobytes()
        == content
        == (data / "tokens.bin").read_bytes()
    )

    (packed / "tokens.bin").unlink()
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SystemExit, match="damaged"):
        backbone_store.open_data(packed)
    shards[1].unlink()
    with pytest.raises(SystemExit, match=r"missing: tokens\.xz\.001"):
        backbone_store.open_data(packed)
    assert not (packed / "tokens.bin").exists()


# ---- parts of the training


def test_training_imports_only_what_a_bare_gpu_machine_has():
    allowed = {"torch", "numpy", "transformers", "safetensors", *sys.stdlib_module_names}
    files, seen = ["train_tiny_backbone"], set()
    while files:
        name = files.pop()
        seen.add(name)
        for node in ast.walk(
            ast.parse(Path(train_tiny_backbone.__file__).with_name(f"{name}.py").read_text())
        ):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for package in {name.split(".")[0] for name in names} - allowed - seen:
                assert package.startswith("backbone_"), f"{name}.py imports {package}"
                files.append(package)
    assert seen == {"train_tiny_backbone", "backbone_training", "backbone_card", "backbone_store"}


def test_batched_muon_is_torchs_muon():
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 20), (20, 8), (8, 8), (8, 20)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = (
        backbone_training.BatchedMuon(ours, **settings),
        torch.optim.Muon(theirs, **settings),
    )
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert (other - 1).abs().max() > 0.1
        torch.testing.assert_close(mine, other, rtol=0, atol=0.01)  # the iteration runs in bfloat16


def test_rows_cover_each_epoch_once_and_can_start_anywhere():
    stream = np.arange(100, 100 + 7 * 3 + 2, dtype=np.uint16)
    rows = backbone_training.Rows(stream, bos=1, context=4, seed=5)
    # three epochs of seven rows, batches across them
    through = torch.cat([rows.batch(at, 3) for at in range(0, 21, 3)])
    assert (through[:, 0] == 1).all()
    for epoch in through[:, 1:].split(7):
        assert torch.equal(epoch.flatten().sort().values, torch.arange(100, 121))
    assert not torch.equal(through[:7], through[7:14])
    fresh = backbone_training.Rows(stream, bos=1, context=4, seed=5)
    assert torch.equal(fresh.batch(6, 3), through[6:9])
    assert not torch.equal(backbone_training.Rows(stream, 1, 4, seed=6).batch(0, 21), through)
    pinless = backbone_training.prefetched(fresh, 9, 3, torch.device("cpu"))
    assert torch.equal(torch.cat([next(pinless), next(pinless)]), through[9:15])
    with pytest.raises(SystemExit, match="less than one row"):
        backbone_training.Rows(stream, bos=1, context=50, seed=5)


@pytest.mark.thorough
def test_flops_formula_is_what_torch_counts(trained: Path):
    model = AutoModelForCausalLM.from_pretrained(trained)
    ids = torch.zeros(2, 32, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    ours = backbone_training.forward_flops_per_token(model.config, 32) * ids.numel()
    without_attention = backbone_training.forward_flops_per_token(model.config, 0) * ids.numel()
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert without_attention != pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.thorough
def test_compiled_training_keeps_sdpa_without_a_mask(trained: Path):
    """A mask would keep sdpa from its causal kernel: why the forward pass does not say
    use_cache=False.
    """
    model, found = AutoModelForCausalLM.from_pretrained(trained).train(), []

    def backend(graph, _):
        found.extend(n.kwargs for n in graph.graph.nodes if "scaled_dot_product" in str(n.target))
        return graph

    ids = torch.zeros(2, 32, dtype=torch.int64)
    torch.compile(model, backend=backend, dynamic=False)(input_ids=ids, labels=ids)
    assert len(found) == 2
    assert all(kwargs["is_causal"] is True and kwargs["attn_mask"] is None for kwargs in found)


def test_learning_rate_warms_up_and_decays():
    rates = [
        backbone_training.learning_rate(progress, 1.0) for progress in (0.0, 0.01, 0.02, 0.5, 1.0)
    ]
    assert rates == pytest.approx([0.0, 0.5 * 0.9902, 0.9804, 0.51, 0.02])


@pytest.mark.thorough
def test_gradient_accumulation_changes_nothing(data: Path, tmp_path: Path, trained: Path):
    parts = train(data, tmp_path / "parts", "--budget-tokens", "2000", "--part-rows", "3")
    whole = train(data, tmp_path / "whole", "--budget-tokens", "2000", "--part-rows", "8")
    a, b, far = (load_file(folder / "model.safetensors") for folder in (parts, whole, trained))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0.05, atol=0.005)
    assert any((a[name] - far[name]).abs().max() > 0.05 for name in a)


# ---- the whole training


@pytest.mark.thorough
def test_training_lowers_the_loss(trained: Path):
    told = json.loads((trained / "training.json").read_text())
    losses = [loss for _, loss in told["curve"]]
    assert len(losses) == 12  # 235 steps of 256 tokens, one value each 20
    assert losses[0] == pytest.approx(np.log(300), abs=0.3)
    assert told["final_loss"] < losses[0] - 1
    assert told["tokens"] == 235 * 256


@pytest.mark.thorough
def test_folder_loads_everywhere(trained: Path):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(trained),
        AutoTokenizer.from_pretrained(trained),
    )
    assert model.dtype == torch.bfloat16
    assert tokenizer.model_max_length == 32
    assert tokenizer("river stone")["input_ids"][0] == model.config.bos_token_id == 1
    backbone = load_backbone(ModelSettings(name=str(trained), device="cpu"))
    assert backbone.bos_id == 1
    card = (trained / "README.md").read_text()
    told = json.loads((trained / "training.json").read_text())
    assert "license: cc-by-sa-4.0" in card
    assert "b: CC-BY-SA-4.0" in card
    assert "python tools/train_tiny_backbone.py --data DIR --out DIR --budget-tokens 60000 " in card
    assert f"| all | {told['perplexity_per_word']['all']:.1f} |" in card
    assert str(trained.parent) not in card + json.dumps(told)


@pytest.mark.thorough
def test_perplexity_is_that_of_documents_one_by_one(trained: Path, data: Path):
    opened = backbone_store.open_data(data)
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    nll, words = 0.0, 0
    for document in opened.heldout:
        assert len(document["ids"]) > 31, "the documents must span several rows"
        words += document["words"]
        for at in range(0, len(document["ids"]), 31):
            ids = torch.tensor([[1, *document["ids"][at : at + 31]]])
            with torch.no_grad():
                nll += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    told = perplexity_per_word(model, opened, context=32, rows=4)
    assert set(told) == {"h0", "h1", "all"}
    assert told["all"] == pytest.approx(np.exp(nll / words), rel=1e-4)


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the training never came so far"
        time.sleep(0.01)


@pytest.mark.thorough
def test_killed_training_ends_with_the_same_weights(data: Path, tmp_path: Path):
    """SIGTERM, then SIGKILL between two checkpoints, then to the end: bit for bit as one that was
    never stopped.
    """
    options = ["--budget-tokens", "48000", "--print-seconds", "0.05"]
    whole = train(data, tmp_path / "whole", *options)
    cut, checkpoint = tmp_path / "cut", tmp_path / "cut.checkpoint" / "checkpoint.json"
    words = [
        sys.executable,
        train_tiny_backbone.__file__,
        "--data",
        str(data),
        "--out",
        str(cut),
        *SIZES,
    ]
    steps = []
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        frequent = ["--checkpoint-minutes", "0.002" if number == signal.SIGKILL else "5"]
        log = tmp_path / f"{number.name}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*words, *options, *frequent],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            try:
                before = steps[-1] if steps else 0
                wait_for(lambda log=log: "MFU" in log.read_text(), process)
                if number == signal.SIGKILL:
                    wait_for(
                        lambda before=before: (
                            json.loads(checkpoint.read_text())["state"]["step"] > before + 5
                        ),
                        process,
                    )
                process.send_signal(number)
                assert process.wait(timeout=60) == code, log.read_text()
            finally:
                process.kill()
                process.wait()
        steps.append(json.loads(checkpoint.read_text())["state"]["step"])
    assert 0 < steps[0] < steps[1] < 188
    assert not cut.exists()
    train(data, cut, *options)
    expected, found = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    curves = [
        json.loads((folder / "training.json").read_text())["curve"] for folder in (whole, cut)
    ]
    assert curves[0] == curves[1]


# ---- refusals


@pytest.mark.thorough
def test_other_data_or_model_is_refused(corpus: Path, data: Path, trained: Path, tmp_path: Path):
    checkpoint = [
        "--checkpoint",
        str(trained.with_name("tiny.checkpoint")),
        "--budget-tokens",
        "60000",
        "--lr",
        "0.02",
    ]
    other = make_data(corpus, tmp_path / "other", "--seed", "1")
    with pytest.raises(SystemExit, match=r"of another training \(data was"):
        train(other, tmp_path / "out", *checkpoint)
    with pytest.raises(SystemExit, match="hidden_size was 32, now 64"):
        train(data, tmp_path / "out", *checkpoint, "--hidden", "64")
    with pytest.raises(SystemExit, match="intermediate_size was 64, now 96"):
        train(data, tmp_path / "out", *checkpoint, "--intermediate", "96")
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_too_large_a_model_is_refused(data: Path, trained: Path, tmp_path: Path):
    with pytest.raises(SystemExit, match="over --max-mib"):
        train(data, tmp_path / "out", "--budget-tokens", "1000", "--max-mib", "0.05")
    weights = 2 * json.loads((trained / "training.json").read_text())["parameters"] / 2**20
    with pytest.raises(SystemExit, match="over --max-mib"):  # fits but for the file's header
        train(
            data, tmp_path / "out", "--budget-tokens", "1000", "--max-mib", f"{weights + 1e-4:.7f}"
        )
    assert not (tmp_path / "out").exists()


def test_changed_data_file_is_refused(corpus: Path, tmp_path: Path):
    data = make_data(corpus, tmp_path / "data")
    with (data / "tokens.bin").open("r+b") as stream:
        stream.write(b"\x07\x00\x07")
    with pytest.raises(SystemExit, match=r"tokens\.bin: missing, or not the file"):
        backbone_store.open_data(data)


def test_loss_that_is_not_finite_ends_training_without_a_checkpoint(data: Path, tmp_path: Path):
    with pytest.raises(SystemExit, match="the loss is nan"):
        train(data, tmp_path / "out", "--budget-tokens", "20000", "--lr", "1e30")
    assert not (tmp_path / "out.checkpoint").exists()


@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        (backbone_data, "--corpus C --out O --vocab 100", "259"),
        (backbone_data, "--corpus nowhere --out O", r"heldout\.jsonl: no such file"),
        (
            backbone_data,
            "--corpus C --out O --shares unheard=1",
            r"unheard\.jsonl\.zst: no such file",
        ),
        (backbone_data, "--corpus C --out O --shares plain", "expected NAME=SHARE"),
        (backbone_data, "--corpus C --out O --exclude nowhere.jsonl", "no such file"),
        (backbone_data, "--corpus C --out C", "holds something else"),
        (train_tiny_backbone, "--data nowhere --out O --budget-tokens 5", r"no data\.json"),
        (train_tiny_backbone, "--data D --out O", "budget-tokens .* is required"),
        (
            train_tiny_backbone,
            "--data D --out O --budget-tokens 5 --budget-minutes 1",
            "not allowed with",
        ),
        (train_tiny_backbone, "--data D --out O --budget-tokens 0", "above 0"),
        (train_tiny_backbone, "--data D --out O --budget-tokens x", "invalid positive_int value"),
        (
            train_tiny_backbone,
            "--data D --out O --budget-tokens 5 --hidden 30 --heads 4",
            "even multiple",
        ),
        (train_tiny_backbone, "--data D --out C --budget-tokens 5", "holds something else"),
        (
            train_tiny_backbone,
            "--data D --out O --budget-tokens 5 --context 100000",
            "less than one row",
        ),
    ],
)
def test_bad_arguments_end_with_one_line(
    tool, arguments: str, told: str, corpus: Path, data: Path, tmp_path: Path
):
    places = {"C": str(corpus), "D": str(data), "O": str(tmp_path / "out")}
    with pytest.raises(SystemExit, match=told) as stop:
        tool.main([places.get(word, word) for word in arguments.split()])
    assert isinstance(stop.value.code, str), "a message: printed alone, exit code 1"
    assert "\n" not in stop.value.code
    assert not (tmp_path / "out").exists()


def test_broken_corpus_row_is_named(corpus: Path, tmp_path: Path):
    (tmp_path / "heldout.jsonl").write_text("")
    write_rows(
        tmp_path / "plain.jsonl.zst", [{"source": "a", "license": "b", "text": "c"}, {"text": "d"}]
    )
    with pytest.raises(
        SystemExit,
        match=r"plain\.jsonl\.zst, line 2: expected an object with the texts source, license",
    ):
        backbone_data.main(
            ["--corpus", str(tmp_path), "--out", str(tmp_path / "out"), "--shares", "plain=1"]
        )
    (tmp_path / "plain.jsonl.zst").write_bytes(b"no zstandard at all")
    with pytest.raises(SystemExit, match="damaged"):
        backbone_data.main(
            ["--corpus", str(tmp_path), "--out", str(tmp_path / "out"), "--shares", "plain=1"]
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout.jsonl", "plain.jsonl.zst"]
