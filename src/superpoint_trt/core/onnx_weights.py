"""Refuses an .onnx whose weights lie in another file: a runtime would read whatever file it names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from superpoint_trt.core.files import PathLike
from superpoint_trt.core.types import SuperPointError

if TYPE_CHECKING:
    import onnx

_KEY = b"location"
"""Every tensor that lies in another file has an entry with this key."""


def refuse_weights_elsewhere(model: onnx.ModelProto, path: PathLike) -> None:
    """Refuses a parsed model that keeps a tensor in another file.

    Raises:
        SuperPointError: naming the tensor.
    """
    for tensor in _tensors(model.graph):
        if tensor.data_location == tensor.EXTERNAL:
            raise SuperPointError(
                f"{path} keeps its weights ({tensor.name}, ...) in another file; make it one file: "
                "onnx.save(onnx.load(path), path)."
            )


def refuse_bytes_with_weights_elsewhere(data: bytes, path: PathLike) -> None:
    """Refuses the bytes of such a model; they are parsed only if they may be one.

    Raises:
        SuperPointError: naming the tensor.
    """
    if _KEY not in data:
        return
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, UnicodeDecodeError):
        return  # the runtime says what is wrong with it
    refuse_weights_elsewhere(model, path)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _tensors(inner)
