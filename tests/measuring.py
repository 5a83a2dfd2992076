"""What a piece of work costs: FLOPs as torch counts them, Python's peak of memory."""

import contextlib
import tracemalloc

import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop


class NoModules(contextlib.nullcontext):
    """In place of the counter's look-up of modules, which cannot stand `autograd.grad` inside a
    forward pass.
    """

    parents = ("Global",)

    def __exit__(self, *_):
        pass


def added_in_place(added, a, b, out_shape=None, **_):
    return addmm_flop(added, a, b)


def counted(work):
    # torch counts addmm, but not the form that adds in place
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_in_place})
    counter.mod_tracker = NoModules()
    with counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
