"""The messages of the Open Inference Protocol v2 over gRPC, built from the table below.

Names and numbers are those of the protocol's ``open_inference_grpc.proto`` (and of Triton's for the
repository index). A table instead of generated code: it works with every protobuf runtime, and it
lives in a pool of its own, so that a program may also load a client's generated copy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

SERVICE = "inference.GRPCInferenceService"

# Each message's fields by number; "*" marks a repeated field, "map" one of InferParameter by name.
_TENSOR = "name:1:string datatype:2:string shape:3:int64*"
_REQUEST = "model_name:1:string model_version:2:string id:3:string parameters:4:map"
_NAMED = "name:1:string version:2:string"
_MESSAGES: Mapping[str, str] = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live:1:bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready:1:bool",
    "ModelReadyRequest": _NAMED,
    "ModelReadyResponse": "ready:1:bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name:1:string version:2:string extensions:3:string*",
    "ModelMetadataRequest": _NAMED,
    "TensorMetadata": _TENSOR,
    "ModelMetadataResponse": "name:1:string versions:2:string* platform:3:string "
    "inputs:4:TensorMetadata* outputs:5:TensorMetadata*",
    "InferParameter": "bool_param:1:bool int64_param:2:int64 string_param:3:string "
    "double_param:4:double uint64_param:5:uint64",
    "InferTensorContents": "bool_contents:1:bool* int_contents:2:int32* int64_contents:3:int64* "
    "uint_contents:4:uint32* uint64_contents:5:uint64* fp32_contents:6:float* "
    "fp64_contents:7:double* bytes_contents:8:bytes*",
    "InferInputTensor": f"{_TENSOR} parameters:4:map contents:5:InferTensorContents",
    "InferRequestedOutputTensor": "name:1:string parameters:2:map",
    "ModelInferRequest": f"{_REQUEST} inputs:5:InferInputTensor* "
    "outputs:6:InferRequestedOutputTensor* raw_input_contents:7:bytes*",
    "InferOutputTensor": f"{_TENSOR} parameters:4:map contents:5:InferTensorContents",
    "ModelInferResponse": f"{_REQUEST} outputs:5:InferOutputTensor* raw_output_contents:6:bytes*",
    "ModelIndex": "name:1:string version:2:string state:3:string reason:4:string",
    "RepositoryIndexRequest": "repository_name:1:string ready:2:bool",
    "RepositoryIndexResponse": "models:1:ModelIndex*",
    "RepositoryModelLoadRequest": "repository_name:1:string model_name:2:string",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": "repository_name:1:string model_name:2:string",
    "RepositoryModelUnloadResponse": "",
}
_ONEOF = {"InferParameter": "parameter_choice"}
_F = FieldDescriptorProto


def _build(messages: Mapping[str, str]) -> DescriptorPool:
    file = FileDescriptorProto(name="shoal/oip.proto", package="inference", syntax="proto3")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        if name in _ONEOF:
            message.oneof_decl.add(name=_ONEOF[name])
        for field in fields.split():
            _add_field(message, field.split(":"), in_oneof=name in _ONEOF)
    pool = DescriptorPool()
    pool.Add(file)
    return pool


def _add_field(message: DescriptorProto, parts: Sequence[str], *, in_oneof: bool) -> None:
    name, number, kind = parts
    field = message.field.add(name=name, number=int(number), label=_F.LABEL_OPTIONAL)
    if kind == "map":
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add_field(entry, ("key", "1", "string"), in_oneof=False)
        _add_field(entry, ("value", "2", "InferParameter"), in_oneof=False)
        kind = f"{message.name}.{entry.name}*"
    if kind.endswith("*"):
        field.label, kind = _F.LABEL_REPEATED, kind.removesuffix("*")
    if kind[0].isupper():
        field.type, field.type_name = _F.TYPE_MESSAGE, f".inference.{kind}"
    else:
        field.type = _F.Type.Value(f"TYPE_{kind.upper()}")
    if in_oneof:
        field.oneof_index = 0


_POOL = _build(_MESSAGES)


def message(name: str) -> Any:
    """Return the class of a message of the protocol."""
    return GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))
