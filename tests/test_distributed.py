"""Two processes with b texts each are one process with 2b: gradients, trained weights, and what
rank 0 does for both.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.numpy import load_file

from llm2comp.errors import RunError
from llm2comp.recipe import load_recipe, parse_recipe
from llm2comp.training import stages
from llm2comp.training.ranks import check_launch, on_main, sharding
from small_stages import make_stage, run_stage
from test_recipes import RECIPES
from tiny_run import make_tree, sentences, write_pairs, write_rows
from two_ranks import in_ranks, refused_run, step_gradients, whole_run

NESTED = {"memory": {"tokens": 3, "nested": [1, 2]}}
PLAIN = {"group_by_length": False}  # otherwise the order of samples hangs on the batch size
FLOAT32 = 2e-6


def mean_of(objective, accumulated=1):
    return (
        "pretext",
        PLAIN | {"objective": objective, "gradient_accumulation_steps": accumulated},
        {},
    )


FAST = [
    mean_of("continuation", accumulated=2),
    ("scl", {"train_memory": True, "mini_batch_size": 2}, NESTED),
]
OTHERS = [
    mean_of("ctkd"),
    mean_of("ctkd", accumulated=2),
    mean_of("continuation"),
    ("pretext", PLAIN | {"objective": {"ctkd": 1.0, "mntp": 0.5, "reconstruction": 1.0}}, NESTED),
    ("pretext", PLAIN | {"train_embeddings": "all", "gradient_checkpointing": True}, {}),
    ("ucl", {"train_memory": True}, {}),
    ("ucl", {"train_memory": True, "denominator": "both_views", "mini_batch_size": 2}, {}),
    ("ucl", {"train_memory": True, "views": "crop", "steps": 2}, {}),
    ("scl", {}, {}),
    ("scl", {"mini_batch_size": 2}, {}),
    ("scl", {"train_memory": True}, NESTED),
    ("scl", {"steps": 3}, {}),
]


def of_size(cases, batch_size):
    return [
        (name, settings | {"batch_size": batch_size}, changes) for name, settings, changes in cases
    ]


def furthest(found, expected):
    """Largest relative distance of two gradients over the parameters, of which there must be all
    and none zero.
    """
    assert found.keys() == expected.keys()
    assert len(expected) >= 20
    sizes = {name: np.linalg.norm(gradient) for name, gradient in expected.items()}
    assert min(sizes.values()) > 1e-6, "vacuous: a gradient is zero"
    return max(np.linalg.norm(found[name] - expected[name]) / sizes[name] for name in sizes)


def assert_two_are_one(folder, cases, sharded=False, most=FLOAT32):
    """2 ranks × 2 samples, 1 × 4 and, for a guard, 1 × 2: what rank 0 alone would find."""
    make_tree(folder)
    alone = in_ranks(1, step_gradients, folder, of_size(cases, 4) + of_size(cases, 2))[0]
    ranks = in_ranks(2, step_gradients, folder, of_size(cases, 2), sharded)
    for number, case in enumerate(cases):
        whole, half = alone[number], alone[len(cases) + number]
        assert furthest(half, whole) > 0.05, f"vacuous: half of the batch would do for {case}"
        for found in ranks:
            assert furthest(found[number], whole) < most, case


@pytest.mark.thorough
def test_two_ranks_have_the_gradients_of_one_process(tmp_path):
    assert_two_are_one(tmp_path, FAST)


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one_process_in_all_stages(tmp_path):
    assert_two_are_one(tmp_path, OTHERS)


@pytest.mark.slow
def test_batches_are_drawn_for_all_ranks_together(tmp_path):
    """Pairs with and without hard negatives, which are tables of their own, and texts that are
    there twice.
    """
    make_tree(tmp_path)
    pairs = str(write_pairs(tmp_path / "mixed.jsonl", [0, 1] * 8))
    twice = str(
        write_rows(tmp_path / "twice.jsonl", [{"text": text} for text in sentences(10) * 2])
    )
    scl = make_tree(tmp_path)["scl"]["data"][0] | {"source": pairs}
    cases = [
        ("scl", {"data": [scl], "steps": 3}, {}),
        ("ucl", {"data": [{"source": twice}], "steps": 2}, {}),
    ]
    assert_two_are_one(tmp_path, cases)


@pytest.mark.slow
def test_what_few_different_rows_allow_is_reckoned_for_all_ranks(tmp_path):
    """10 different texts and 2 × 16 asked for; six pairs with a hard negative, too few for a joint
    batch of 2 × 4, are a batch with the others.
    """
    make_tree(tmp_path)
    twice = [{"text": text} for text in sentences(10) * 8]
    write_rows(tmp_path / "twice.jsonl", twice)
    data = [{"source": str(tmp_path / "twice.jsonl")}]
    pairs = str(write_pairs(tmp_path / "mixed.jsonl", [0] * 12 + [1] * 6))
    scl = make_tree(tmp_path)["scl"]["data"][0] | {"source": pairs}

    def cases(most, b):
        return [
            ("ucl", {"data": data, "batch_size": most}, {}),
            ("scl", {"data": [scl], "steps": 2, "batch_size": b}, {}),
        ]

    (one,) = in_ranks(1, step_gradients, tmp_path, cases(10, 8))
    for found in in_ranks(2, step_gradients, tmp_path, cases(16, 4)):
        assert [furthest(*pair) < FLOAT32 for pair in zip(found, one, strict=True)] == [True, True]


@pytest.mark.slow
def test_a_short_last_batch_is_left_out(tmp_path):
    """24 pairs in batches of 2 × 5: two to an epoch; all ranks go on to the next one together."""
    make_tree(tmp_path)
    ranks = in_ranks(2, step_gradients, tmp_path, [("scl", {"batch_size": 5, "steps": 5}, {})])
    assert furthest(ranks[0][0], ranks[1][0]) == 0.0


def weights_of(run):
    files = [
        f"{stage}/{part}"
        for stage in ("1-pretext", "2-ucl", "3-scl")
        for part in ("memory", "adapter/adapter_model")
    ]
    return {
        (file, name): x
        for file in files
        for name, x in load_file(run / f"{file}.safetensors").items()
    }


def assert_same_run(found, expected):
    """Weights after all three stages, and an exported encoder.

    Adam's step is a gradient's sign at first: noise grows.
    """
    found, expected, trained = weights_of(found), weights_of(expected), 0
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        trained += np.linalg.norm(x) > 0
        assert np.linalg.norm(found[name] - x) <= 1e-4 * np.linalg.norm(x), name
    assert trained == len(expected) >= 3 * 24, "vacuous: a weight is zero"


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_train_the_weights_of_one_process(tmp_path, sharded):
    """All stages, one of them stopped at a checkpoint and resumed by new processes."""
    make_tree(tmp_path)
    in_ranks(1, whole_run, tmp_path, 4, tmp_path / "one")
    in_ranks(2, whole_run, tmp_path, 2, tmp_path / "two", sharded, 5)
    assert (tmp_path / "two/2-ucl/checkpoint-4/complete").exists()
    assert not (tmp_path / "two/2-ucl/done.json").exists(), "vacuous: nothing was stopped"
    in_ranks(2, whole_run, tmp_path, 2, tmp_path / "two", sharded)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two/model/modules.json").exists()


def test_an_error_of_rank_0_reaches_all(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    said = in_ranks(2, refused_run, tmp_path / "full")
    assert "would replace what is not its own" in said[0]
    assert said[0] == said[1]


def test_on_main_alone_is_a_plain_call():
    assert on_main(lambda: 5, "cpu") == 5
    with pytest.raises(ZeroDivisionError):
        on_main(lambda: 1 // 0, "cpu")


@pytest.mark.slow
def test_an_error_of_another_rank_ends_the_run(tmp_path):
    """The launcher ends rank 0, which waits for rank 1, within seconds."""
    make_tree(tmp_path)
    program = tmp_path / "program.py"
    program.write_text(
        f"""import os, sys
sys.path.insert(0, {str(RECIPES.parent / "tests")!r})
from llm2comp.training import run
from tiny_run import make_tree
from llm2comp.recipe import parse_recipe
from pathlib import Path
def fail(*_):
    raise ArithmeticError("rank 1 is broken")
if os.environ["RANK"] == "1":
    run.RUNNERS["pretext"] = fail
run.train(parse_recipe(make_tree(Path({str(tmp_path)!r}))), {str(tmp_path / "run")!r})
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode != 0
    assert "rank 1 is broken" in done.stderr


def launched(name):
    """What `accelerate launch --config_file recipes/launch/NAME` would set for each process."""
    arguments = ["--config_file", str(RECIPES / "launch" / name), "-m", "llm2comp", "train", "tiny"]
    args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
    return args, launch.prepare_multi_gpu_env(args)


def test_launch_files_say_to_accelerate_what_they_mean(monkeypatch):
    kinds = {"ddp.yaml": "MULTI_GPU", "fsdp2.yaml": "FSDP", "zero3.yaml": "DEEPSPEED"}
    files = {
        file.name: load_config_from_file(str(file)) for file in (RECIPES / "launch").glob("*.yaml")
    }
    assert {name: config.distributed_type.value for name, config in files.items()} == kinds
    for name, kind in (("ddp.yaml", None), ("fsdp2.yaml", "FSDP")):
        args, environment = launched(name)
        assert (args.use_fsdp, args.use_deepspeed, args.module) == (kind == "FSDP", False, True)
        with monkeypatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            assert sharding() == kind
            check_launch(load_recipe("tiny"))
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert files["zero3.yaml"].deepspeed_config["zero_stage"] == 3


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "changes", "expected"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, r"pip install .*\[deepspeed\]"),
        (FSDP2 | {"FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
        (FSDP2, {"keep_best": "effective_rank"}, "pretext.keep_best"),
        (FSDP2, {"max_tokens_per_batch": 64}, "pretext.max_tokens_per_batch"),
        (FSDP2, {}, None),
    ],
)
def test_what_a_launch_cannot_go_with_is_refused(
    tmp_path, monkeypatch, environment, changes, expected
):
    tree = make_tree(tmp_path, watch={})
    tree["pretext"] |= changes
    recipe = parse_recipe(tree)
    check_launch(recipe)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if expected is None:
        check_launch(recipe)
    else:
        with pytest.raises(RunError, match=expected):
            check_launch(recipe)


@pytest.mark.parametrize("name", ["pretext", "scl"])
def test_one_process_trains_on_one_of_several_gpus(tmp_path, monkeypatch, name):
    """transformers would make each batch twice as large, for two replicas of the encoder."""
    stage = make_stage(tmp_path, name)
    alone = run_stage(name, stage, tmp_path / "alone", monkeypatch)
    for kind in ("TrainingArguments", "SentenceTransformerTrainingArguments"):
        plain = getattr(stages, kind)

        def with_two(plain=plain, **settings):
            arguments = plain(**settings)
            assert arguments.n_gpu < 2, "this machine has them itself"
            arguments._n_gpu = 2
            return arguments

        monkeypatch.setattr(stages, kind, with_two)
    beside = run_stage(name, stage, tmp_path / "beside", monkeypatch)
    shapes = [[ids.shape for ids in batch] for batch in alone.batches]
    assert [[ids.shape for ids in batch] for batch in beside.batches] == shapes
    assert all(torch.equal(beside.weights[key], alone.weights[key]) for key in alone.weights)
    assert alone.weights


def test_a_gpu_of_a_number_is_refused(tmp_path, monkeypatch):
    """The trainer would take the first one."""

    tree = make_tree(tmp_path)
    first, second = (
        parse_recipe(tree | {"model": tree["model"] | {"device": f"cuda:{number}"}})
        for number in range(2)
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_launch(first)
    with pytest.raises(RunError, match="CUDA_VISIBLE_DEVICES=1"):
        check_launch(second)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="model.device: auto"):
        check_launch(first)
