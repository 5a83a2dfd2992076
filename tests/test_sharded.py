"""FSDP2: weights spread over two processes give the gradients of one process; what is saved is
whole.
"""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from families import make_compressor
from llm2comp.model.backbone.sharded import fill, gathered, save_whole, writes
from llm2comp.training import trainers
from test_distributed import (
    FAST,
    FLOAT32,
    NESTED,
    OTHERS,
    PLAIN,
    assert_two_are_one,
    furthest,
    of_size,
)
from tiny_run import make_tree
from two_ranks import in_ranks, step_gradients

BF16 = {"precision": "bfloat16"}


@pytest.mark.thorough
def test_shards_have_the_gradients_of_one_process(tmp_path):
    assert_two_are_one(tmp_path, FAST, sharded=True)


@pytest.mark.slow
def test_shards_have_the_gradients_of_one_process_in_all_stages(tmp_path):
    assert_two_are_one(tmp_path, OTHERS, sharded=True)


@pytest.mark.slow
def test_shards_of_a_full_copy(tmp_path):
    assert_two_are_one(tmp_path, [("pretext", PLAIN, {"adapter": {"kind": "full"}})], sharded=True)


@pytest.mark.slow
def test_shards_of_two_dtypes(tmp_path):
    """float32 adapters and memory over a bfloat16 base, and autocast: rounded as without shards, on
    as many ranks.
    """
    make_tree(tmp_path)
    model = {"model": {"name": str(tmp_path / "backbone"), "device": "cpu", "dtype": "bfloat16"}}
    cached = {"mini_batch_size": 1}
    exact = of_size([("pretext", PLAIN, {}), ("pretext", PLAIN, {}), ("scl", cached, {})], 2)
    rounded = of_size(
        [("pretext", PLAIN, model), ("pretext", PLAIN | BF16, {}), ("scl", cached | BF16, {})], 2
    )
    plain, spread = (
        in_ranks(2, step_gradients, tmp_path, exact + rounded, sharded)[0]
        for sharded in (False, True)
    )
    for number in (3, 4, 5):
        assert furthest(plain[number], plain[number - 3]) > 1e-3, "vacuous: nothing is rounded"
        assert furthest(spread[number], plain[number]) < FLOAT32


def without_a_whole_root(folder, cases):
    trainers.root_stays_whole = contextlib.nullcontext
    return step_gradients(folder, cases, True)


@pytest.mark.slow
def test_the_root_must_stay_whole(tmp_path):
    """Nested memory has several backward passes inside a forward pass; without `root_stays_whole`
    the second finds no head.
    """
    make_tree(tmp_path)
    with pytest.raises(AssertionError, match="DTensor"):
        in_ranks(2, without_a_whole_root, tmp_path, of_size([("pretext", PLAIN, NESTED)], 2))


def spread_and_back(folder):
    """In each rank: spread, fill, save; a third row over two ranks."""
    distributed.init_process_group("gloo")
    rank, mesh = distributed.get_rank(), init_device_mesh("cpu", (2,))
    values = torch.arange(12.0).view(3, 4)
    parts = [
        distribute_tensor(torch.zeros(3, 4), mesh, [placed]) for placed in (Shard(0), Replicate())
    ]
    for part in parts:
        assert isinstance(part, DTensor)
        fill(part, values)
    save_whole(
        {"shard": parts[0], "copy": parts[1], "plain": values + rank},
        folder / f"of-rank-{rank}/file.safetensors",
    )
    return len(parts[0].to_local()), writes()


def test_saved_is_the_whole_by_rank_0(tmp_path):
    assert in_ranks(2, spread_and_back, tmp_path) == [(2, True), (1, False)]
    values = torch.arange(12.0).view(3, 4)
    found = load_file(tmp_path / "of-rank-0/file.safetensors")
    assert {name: torch.equal(x, values) for name, x in found.items()} == {
        "shard": True,
        "copy": True,
        "plain": True,
    }
    assert not (tmp_path / "of-rank-1").exists()


def test_without_processes_all_is_plain(tmp_path):
    assert writes()
    x = torch.zeros(2, dtype=torch.bfloat16)
    fill(x, torch.ones(2))
    save_whole({"x": x}, tmp_path / "new/file.safetensors")
    assert torch.equal(load_file(tmp_path / "new/file.safetensors")["x"], x)


class Gathered:
    """DeepSpeed's class of that name, as documented: parameters are whole inside, rank 0's changes
    stay.
    """

    asked: list[nn.Parameter]

    def __init__(self, parameters, modifier_rank=None):
        Gathered.asked, self.rank = list(parameters), modifier_rank

    def __enter__(self):
        for parameter in self.asked:
            parameter.data = parameter.hidden

    def __exit__(self, *_):
        assert self.rank == 0
        for parameter in self.asked:
            parameter.hidden, parameter.data = parameter.data, torch.empty(0)


def test_zero_3_is_gathered_for_saving_and_loading(tmp_path, monkeypatch):
    """Against a stand-in for DeepSpeed, which is not there: what is saved and loaded is asked for,
    and nothing of the base.
    """
    monkeypatch.setitem(
        sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Gathered))
    )
    compressor, other = make_compressor("llama"), make_compressor("llama")
    name = compressor.backbone.adapters.names[-1]
    compressor.save(tmp_path / "plain", name)
    for model in (compressor, other):
        for parameter in model.parameters():
            parameter.ds_id, parameter.hidden, parameter.data = 0, parameter.data, torch.empty(0)
    with torch.no_grad():
        for parameter in other._saved(name):
            parameter.hidden = torch.zeros_like(parameter.hidden)
    compressor.save(tmp_path / "spread", name)
    assert len(Gathered.asked) == len(compressor.backbone.adapters.parameters(name)) + 1
    other.load(tmp_path / "spread", name)
    other.save(tmp_path / "again", name)
    for file in ("memory.safetensors", "adapter/adapter_model.safetensors"):
        expected = load_file(tmp_path / "plain" / file)
        assert any(x.any() for x in expected.values())
        for folder in ("spread", "again"):
            found = load_file(tmp_path / folder / file)
            assert {
                key: torch.equal(x, expected[key]) for key, x in found.items()
            } == dict.fromkeys(expected, True)


def test_deepspeed_is_not_asked_for_what_is_not_spread(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # an import of it fails
    parameter = nn.Parameter(torch.zeros(1))
    with gathered([parameter]):
        assert parameter.numel() == 1
    parameter.ds_id = 0
    with pytest.raises(ImportError), gathered([parameter]):
        pass
