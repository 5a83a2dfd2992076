"""OpenVINO and ONNX Runtime: how each writes the graph of a transformer, and how it runs it.

The one place that knows them.

Both are given eager attention: its mask is a large negative number, not minus infinity, so that a
row of padding that sees nothing (a sliding window) stays finite. The runtimes fuse attention by
themselves.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

NAMES = ("input_ids", "attention_mask")
OUTPUT = "last_hidden_state"
# as sentence-transformers and optimum call them
OPENVINO_FILE, ONNX_FILE = ("openvino_model.xml", "model.onnx")
# ids_BT, mask_BT → states_BTD
RunGraph = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]


@dataclass(frozen=True)
class Runtime:
    """`write(body, ids_BT, mask_BT, folder, precision)` and `open(folder, precision, threads)`.

    What `open` gives may be called at once.
    """

    name: str
    packages: tuple[str, ...]
    precisions: tuple[str, ...]
    write: Callable[[Any, Tensor, Tensor, Path, str], None]
    open: Callable[[Path, str, int], RunGraph]

    def missing(self) -> list[str]:
        """Packages of the extra that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


class _States(nn.Module):
    """The transformer as a function of two tensors, for tracing."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.body(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return found


@contextlib.contextmanager
def _traceable(body: Any) -> Iterator[nn.Module]:
    """The body for tracing: eager attention, no gradients, no remarks about constants."""
    before, exporter = body.config._attn_implementation, logging.getLogger("torch.onnx")
    level = exporter.level
    body.set_attn_implementation("eager")
    exporter.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            yield _States(body).eval()
    finally:
        exporter.setLevel(level)
        body.set_attn_implementation(before)


def _write_openvino(
    body: Any, ids_BT: Tensor, mask_BT: Tensor, folder: Path, precision: str
) -> None:
    import openvino

    free = [(name, [-1, -1], openvino.Type.i64) for name in NAMES]
    with _traceable(body) as states:
        example = dict(zip(NAMES, (ids_BT, mask_BT), strict=True))
        graph = openvino.convert_model(states, example_input=example, input=free)
        graph.outputs[0].get_tensor().set_names({OUTPUT})
        if precision == "int8":
            round_weights(graph)
        openvino.save_model(graph, folder / OPENVINO_FILE, compress_to_fp16=precision == "bfloat16")


def round_weights(graph: Any) -> int:
    """Round an OpenVINO graph's matrices to 8 bits in place.

    Symmetrically, a scale per output (of tables: per row).

    The graph then says matrix = float(int8) · scale, which OpenVINO takes for compressed weights.
    Returns how many.
    """
    import openvino
    from openvino import opset13 as ops

    count = 0
    for op in graph.get_ordered_ops():
        place = {"MatMul": 1, "Gather": 0}.get(op.get_type_name())
        if place is None:
            continue
        constant = op.input_value(place).get_node()
        if constant.get_type_name() != "Constant" or len(constant.shape) != 2:
            continue
        if constant.get_element_type() != openvino.Type.f32:
            continue
        axis = 0 if place and not op.get_attributes()["transpose_b"] else 1
        largest = np.abs(constant.data).max(axis, keepdims=True)
        scale = np.maximum(largest, np.finfo(np.float32).tiny * 127) / 127
        rounded = ops.constant(np.round(constant.data / scale).astype(np.int8))
        again = ops.multiply(
            ops.convert(rounded, openvino.Type.f32), ops.constant(scale.astype(np.float32))
        )
        op.input(place).replace_source_output(again.output(0))
        count += 1
    return count


def _open_openvino(folder: Path, precision: str, threads: int) -> RunGraph:
    import openvino

    hint = "bf16" if precision == "bfloat16" else "f32"
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
    graph = openvino.Core().compile_model(folder / OPENVINO_FILE, "CPU", settings)

    def run(ids_BT: NDArray[np.int64], mask_BT: NDArray[np.int64]) -> NDArray[np.float32]:
        # a request of its own: the result is not overwritten by another call
        request = graph.create_infer_request()
        found: NDArray[np.float32] = request.infer(
            dict(zip(NAMES, (ids_BT, mask_BT), strict=True))
        )[0]
        return found

    return run


def _write_onnx(body: Any, ids_BT: Tensor, mask_BT: Tensor, folder: Path, precision: str) -> None:
    free = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    with _traceable(body) as states:
        program = torch.onnx.export(
            states,
            kwargs=dict(zip(NAMES, (ids_BT, mask_BT), strict=True)),
            dynamic_shapes=dict.fromkeys(NAMES, free),
            input_names=list(NAMES),
            output_names=[OUTPUT],
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        # a file of its own for weights: no limit of 2 GB
        program.save(folder / ONNX_FILE, external_data=True)


def _open_onnx(folder: Path, precision: str, threads: int) -> RunGraph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        folder / ONNX_FILE, options, providers=["CPUExecutionProvider"]
    )

    def run(ids_BT: NDArray[np.int64], mask_BT: NDArray[np.int64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(
            [OUTPUT], dict(zip(NAMES, (ids_BT, mask_BT), strict=True))
        )[0]
        return found

    return run


RUNTIMES = {
    "openvino": Runtime(
        "openvino", ("openvino",), ("float32", "bfloat16", "int8"), _write_openvino, _open_openvino
    ),
    "onnx": Runtime(
        "onnx", ("onnx", "onnxscript", "onnxruntime"), ("float32",), _write_onnx, _open_onnx
    ),
}
