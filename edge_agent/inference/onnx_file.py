"""Refuses model files that reach beyond themselves, before ONNX Runtime opens them.

A tensor of an ONNX file may name *another* file, and ONNX Runtime then reads that one: relative to
the working directory where the model came as bytes. A signed model could so carry a device's own
files, a key say, into its outputs, or read this process's memory by the runtime's own marker. No
model of ours does, so whoever does is refused. This walks the file's protobuf fields itself, as the
agent does not load the onnx package; messages and numbers are those of onnx.proto
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from collections.abc import Iterator, Mapping

from shared.errors import UnfitModelError

# By message: which of its fields are messages that may lead to a tensor.
_LEADS_TO_TENSORS: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}  # fmt: skip
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # fields of Tensor
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5  # protobuf's wire types; groups are no more
_LONGEST_VARINT = 10
_LARGEST_TAG = 2**32 - 1  # protobuf's own parser would cut a larger one, and see another field


def require_self_contained(content: bytes) -> None:
    """Raise UnfitModelError where ``content`` is no ONNX file, or takes data from elsewhere."""
    waiting = [("Model", memoryview(content))]
    while waiting:
        kind, message = waiting.pop()
        inside = _LEADS_TO_TENSORS[kind]
        for number, value in _fields(message):
            if kind == "Tensor" and _is_elsewhere(number, value):
                raise UnfitModelError(
                    "the model takes data from another file; export it as one file"
                )
            if number in inside and isinstance(value, memoryview):
                waiting.append((inside[number], value))


def _is_elsewhere(number: int, value: int | memoryview) -> bool:
    return number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field: an integer, or the bytes of anything else."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        if tag > _LARGEST_TAG:
            raise _no_model()
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            whole, position = _varint(message, position)
            yield number, whole
            continue
        if wire_type == _BYTES:
            size, position = _varint(message, position)
        elif wire_type in {_FIXED_64, _FIXED_32}:
            size = 8 if wire_type == _FIXED_64 else 4
        else:
            raise _no_model()
        end = position + size
        if end > len(message):
            raise _no_model()
        yield number, message[position:end]
        position = end


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return the number that starts at ``position``, and where it ends."""
    value = 0
    for shift in range(_LONGEST_VARINT):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:  # the bit that says "goes on" is not set
            return value, position
    raise _no_model()


def _no_model() -> UnfitModelError:
    return UnfitModelError("the model does not load: the file is no ONNX model, or is cut off")
