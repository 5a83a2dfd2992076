"""Work in two processes that talk through gloo, as torchrun starts them: `in_ranks(2, work, ...)`.

No GPU.

The processes come from a server that has imported everything once, so that a pair of them starts in
a moment.
"""

import contextlib
import functools
import multiprocessing
import os
import socket
import tempfile
import traceback
from pathlib import Path

import torch

from tiny_run import make_tree

PATIENCE = 120.0


@functools.cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["two_ranks", "llm2comp.training.run", "torch.distributed.fsdp", "accelerate.utils"]
    )
    return context


def in_ranks(ranks, work, *arguments):
    """What `work(*arguments)` returns in each rank (one rank: a process of its own without any
    launcher).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = _server().Queue()
    processes = [
        _server().Process(target=_rank, args=(rank, ranks, port, queue, work, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        for _ in processes:
            rank, wrong, found[rank] = queue.get(timeout=PATIENCE)
            assert not wrong, wrong
        for process in processes:
            process.join(PATIENCE)
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(ranks)]


def _rank(rank, ranks, port, queue, work, arguments):
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        queue.put((rank, None, work(*arguments)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
    finally:
        queue.close()
        queue.join_thread()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def shard_on_cpu():
    """What `accelerate launch` with fsdp2.yaml sets, and have accelerate shard on a CPU too, which
    it would not.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }
    begin = PartialState.__init__

    def initialise(self, *arguments, **settings):
        begin(self, *arguments, **settings)
        self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = initialise


def step_gradients(folder, cases, sharded=False):
    """For each (stage, changes of its settings, changes of the recipe): the gradients that the last
    step's optimiser gets.

    Trained is one step unless the settings say otherwise, without dropout, by the stage's own
    function and trainer.

    Returns:
        An array by each parameter's name, per case.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from transformers.modeling_layers import GradientCheckpointingLayer

    from llm2comp.model.backbone import load_backbone
    from llm2comp.model.compressor import Compressor
    from llm2comp.recipe import parse_recipe
    from llm2comp.training import progress, stages

    folder = Path(folder)

    if sharded:
        shard_on_cpu()
    found = {}

    class Recorder(progress.MetricsCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            gradients = {
                n.split("compressor.")[1]: p.grad
                for n, p in model.named_parameters()
                if p.requires_grad
            }
            if sharded:
                spread = [module for module in model.modules() if isinstance(module, FSDPModule)]
                layers = [
                    module
                    for module in model.modules()
                    if isinstance(module, GradientCheckpointingLayer)
                ]
                assert len(spread) == 1 + len(layers) > 2, "not wrapped layer by layer"
                assert all(isinstance(gradient, DTensor) for gradient in gradients.values())
                gradients = {n: gradient.full_tensor() for n, gradient in gradients.items()}
            found[number] = {n: gradient.clone().numpy() for n, gradient in gradients.items()}

    progress.MetricsCallback = Recorder
    for number, (name, settings, changes) in enumerate(cases):  # noqa: B007 Recorder reads it
        tree = make_tree(folder, **changes)
        tree["adapter"] |= {"dropout": 0.0}
        tree[name] |= {"steps": 1, "attention_dropout": 0.0} | settings
        if name != "scl":
            tree["scl"] = None
        recipe = parse_recipe({key: value for key, value in tree.items() if value is not None})
        compressor = Compressor.fresh(
            load_backbone(recipe.model), recipe.memory, recipe.seed, recipe.encoder
        )
        compressor.backbone.add_adapter(name, recipe.adapter, 0.0, 1)
        generator = torch.Generator().manual_seed(5)
        for parameter in compressor.backbone.adapters.parameters(name):
            # at first B = 0: A would have no gradient
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        out = Path(tempfile.mkdtemp(dir=folder))
        with contextlib.redirect_stderr(None):
            stages.RUNNERS[name](
                compressor, recipe.stages[name], out, recipe.seed, stages.RunOptions()
            )
    return [found[number] for number in range(len(cases))]


def whole_run(folder, batch_size, out, sharded=False, stop_at=None):
    """A run of all stages without dropout in the given folder; `stop_at`: fail at this step of
    stage 2.
    """
    from llm2comp.recipe import parse_recipe
    from llm2comp.training import progress
    from llm2comp.training.run import train

    if sharded:
        shard_on_cpu()

    class Stopping(progress.MetricsCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == stop_at and "ucl" in args.output_dir:
                raise InterruptedError("stopped by the test")

    progress.MetricsCallback = Stopping
    tree = make_tree(Path(folder))
    tree["adapter"] |= {"dropout": 0.0}
    tree["pretext"] |= {"group_by_length": False}
    # three batches an epoch: the stop is in the second, which has an order and crops of its own
    tree["ucl"] |= {"steps": 6, "views": "crop", "data": [tree["ucl"]["data"][0] | {"limit": 12}]}
    for name in ("pretext", "ucl", "scl"):
        tree[name] |= {"batch_size": batch_size, "attention_dropout": 0.0, "save_every_steps": 2}
    with contextlib.redirect_stderr(None), contextlib.suppress(InterruptedError):
        train(parse_recipe(tree), out)


def refused_run(out):
    """What a run says in a directory that is not one."""
    from llm2comp.errors import RunError
    from llm2comp.recipe import parse_recipe
    from llm2comp.training.run import train

    try:
        train(parse_recipe(make_tree(Path(out).parent)), out)
    except RunError as error:
        return str(error)
    return None
