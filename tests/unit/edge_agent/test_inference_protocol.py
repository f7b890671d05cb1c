import gzip
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_agent.inference.engine import DTYPES
from edge_agent.inference.protocol import RequestError, compress, decompress, match, parse, render
from shared.manifest import TensorSpec

INPUTS = (TensorSpec("image", "FP32", (-1, 2, 3)), TensorSpec("mask", "UINT8", (-1, 2)))
OUTPUTS = (TensorSpec("scores", "FP32", (-1, 4)), TensorSpec("best", "INT64", (-1,)))


def body(**changes: Any) -> bytes:
    document = {
        "id": "seven",
        "inputs": [
            {"name": "image", "shape": [1, 2, 3], "datatype": "FP32", "data": [0, 1, 2, 3, 4, 0.5]},
            {"name": "mask", "shape": [1, 2], "datatype": "UINT8", "data": [[1, 255]]},
        ],
    }
    return json.dumps({**document, **changes}).encode()


def one_input(**changes: Any) -> bytes:
    tensor = {"name": "mask", "shape": [1, 2], "datatype": "UINT8", "data": [1, 2]}
    return body(inputs=[{k: v for k, v in {**tensor, **changes}.items() if v is not None}])


def in_binary(array: NDArray[Any], datatype: str) -> tuple[bytes, str]:
    content = array.tobytes()
    tensor: dict[str, Any] = {"name": "x", "shape": array.shape, "datatype": datatype}
    tensor["parameters"] = {"binary_data_size": len(content)}
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + content, str(len(head))


def test_json_tensors_may_be_flat_or_nested() -> None:
    feeds = match(parse(body(), None), INPUTS, OUTPUTS)
    np.testing.assert_array_equal(feeds["image"], np.array([[[0, 1, 2], [3, 4, 0.5]]], np.float32))
    np.testing.assert_array_equal(feeds["mask"], np.array([[1, 255]], np.uint8))
    assert feeds["image"].dtype == np.float32
    assert feeds["mask"].dtype == np.uint8


@given(
    datatype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(1, 4), max_size=3),
    seed=st.integers(0, 2**16),
)
def test_binary_tensors_of_every_type_survive_the_way_in_and_out(
    datatype: str, shape: list[int], seed: int
) -> None:
    dtype = DTYPES[datatype]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 2, size=(*shape, dtype.itemsize)).astype(np.uint8)
    array = np.frombuffer(raw.tobytes(), dtype).reshape(shape)
    request = parse(*in_binary(array, datatype))
    found = request.tensors["x"][1]
    np.testing.assert_array_equal(found, array)
    spec = TensorSpec("x", datatype, tuple(shape))
    asked = parse(body(parameters={"binary_data_output": True}), None)
    answer, length = render(asked, model="m", version="v", outputs=[spec], results=[found])
    assert answer[length:] == array.tobytes()


def test_an_answer_echoes_the_id_and_keeps_the_order_of_the_signature() -> None:
    request = parse(body(), None)
    scores, best = np.zeros((1, 4), np.float32), np.array([3])
    answer, length = render(
        request, model="m", version="v", outputs=OUTPUTS, results=[scores, best]
    )
    assert length is None
    assert json.loads(answer) == {
        "model_name": "m",
        "model_version": "v",
        "id": "seven",
        "outputs": [
            {"name": "scores", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]},
            {"name": "best", "datatype": "INT64", "shape": [1], "data": [3]},
        ],
    }


def test_outputs_are_chosen_and_each_may_be_binary_or_not() -> None:
    wanted = [{"name": "best", "parameters": {"binary_data": False}}, {"name": "scores"}]
    request = parse(body(outputs=wanted, parameters={"binary_data_output": True}), None)
    scores, best = np.ones((1, 4), np.float32), np.array([3])
    answer, length = render(
        request, model="m", version="v", outputs=OUTPUTS, results=[scores, best]
    )
    assert length is not None
    described = json.loads(answer[:length])["outputs"]
    assert described[0]["parameters"] == {"binary_data_size": 16}
    assert described[1]["data"] == [3]
    assert answer[length:] == scores.tobytes()

    only_best = parse(body(outputs=[{"name": "best"}]), None)
    answer, _ = render(only_best, model="m", version="v", outputs=OUTPUTS, results=[scores, best])
    assert [output["name"] for output in json.loads(answer)["outputs"]] == ["best"]


def test_numbers_that_are_not_finite_become_null_in_json() -> None:
    spec = TensorSpec("y", "FP32", (-1,))
    result = np.array([np.nan, np.inf, 0.1], np.float32)
    answer, _ = render(
        parse(body(), None), model="m", version="v", outputs=[spec], results=[result]
    )
    assert json.loads(answer)["outputs"][0]["data"] == [None, None, 0.1]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not one of the protocol"),
        (b"\xff\xfe", "not one of the protocol"),
        (b"[]", "not one of the protocol"),
        (b'{"inputs": ' + b"[" * 100_000, "not one of the protocol"),
        (body(inputs="x"), r"not one of the protocol: Expected `array`.*inputs"),
        (one_input(shape=[-1, 2]), "not one of the protocol"),
        (one_input(name=None), "missing required field `name`"),
        (one_input(datatype="FLOAT"), "has type 'FLOAT'; known are BOOL"),
        (one_input(datatype="BYTES", data=["a", "b"]), "has type 'BYTES'"),
        (one_input(data=None), "needs either data or a binary_data_size"),
        (one_input(parameters={"binary_data_size": 2}), "needs either data or"),
        (one_input(parameters={"shared_memory_region": "r"}), "shared memory is not offered"),
        (one_input(data=[1]), r"declares shape \[1, 2\] and holds 1 values"),
        (one_input(data=[[[1, 2]]]), r"holds 2 values of shape \[1, 1, 2\]"),
        (one_input(data=[[1], [2, 3]]), "is not an even array"),
        (one_input(data=[1, 2.5]), "holds other values than UINT8"),
        (one_input(data=["1", "2"]), "holds other values than UINT8"),
        (one_input(data=[1, None]), "holds other values than UINT8"),
        (one_input(data=[1, 256]), "do not fit UINT8"),
        (one_input(data=[1, -1]), "do not fit UINT8"),
        (one_input(data=[1, 2**80]), "holds other values than UINT8"),
        (one_input(datatype="FP32", data=[1e300, 0]), "do not fit FP32"),
        (one_input(datatype="BOOL", data=[0, 1]), "holds other values than BOOL"),
        (one_input(shape=[2**40, 2**40]), "holds 2 values"),
        (body(outputs=[{"name": "best", "parameters": {"classification": 3}}]), "classification"),
        (
            one_input(data=None, parameters={"binary_data_size": 2}),
            "takes 2 bytes, declares 2, and 0 are left",
        ),
        (
            one_input(data=None, shape=[2**62], parameters={"binary_data_size": 2}),
            "takes 4611686018427387904 bytes, declares 2",
        ),
    ],
)
def test_what_breaks_the_protocol_is_refused_with_a_sentence(
    content: bytes, complaint: str
) -> None:
    with pytest.raises(RequestError, match=complaint) as caught:
        parse(content, None)
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)


def test_an_input_given_twice_is_refused() -> None:
    tensor = {"name": "mask", "shape": [1], "datatype": "UINT8", "data": [1]}
    with pytest.raises(RequestError, match="'mask' is given twice"):
        parse(body(inputs=[tensor, tensor]), None)


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "99999", "٣", "", "9" * 30])
def test_an_impossible_header_length_is_refused(length: str) -> None:
    with pytest.raises(RequestError, match="Inference-Header-Content-Length is"):
        parse(body(), length)


def test_bytes_after_the_last_tensor_are_refused() -> None:
    content, length = in_binary(np.zeros(3, np.float32), "FP32")
    with pytest.raises(RequestError, match="1 bytes follow the last tensor"):
        parse(content + b"x", length)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"shape": [1, 6]}, r"'image' wants shape \[-1, 2, 3\].* and got \[1, 6\]"),
        ({"shape": [0, 2, 3], "data": []}, r"at least one, and got \[0, 2, 3\]"),
        ({"datatype": "FP64"}, "'image' wants FP32 and got FP64"),
        ({"name": "picture"}, "no input 'picture'; it has image, mask"),
        ({"shape": [2, 2, 3], "data": [0.0] * 12}, "the inputs have 2 and 1 rows"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused_with_wanted_and_got(
    changes: dict[str, Any], complaint: str
) -> None:
    image, mask = json.loads(body())["inputs"]
    request = parse(body(inputs=[{**image, **changes}, mask]), None)
    with pytest.raises(RequestError, match=complaint):
        match(request, INPUTS, OUTPUTS)


def test_missing_inputs_and_unknown_outputs_are_refused() -> None:
    with pytest.raises(RequestError, match="input 'image' is missing"):
        match(parse(one_input(), None), INPUTS, OUTPUTS)
    with pytest.raises(RequestError, match="no output 'worst'; it has scores, best"):
        match(parse(body(outputs=[{"name": "worst"}]), None), INPUTS, OUTPUTS)


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_compressed_bodies_are_unpacked_within_the_limit(encoding: str, pack: Any) -> None:
    content = body()
    assert decompress(pack(content), encoding, limit_bytes=len(content)) == content
    with pytest.raises(RequestError, match="over the limit") as caught:
        decompress(pack(content), encoding, limit_bytes=len(content) - 1)
    assert caught.value.status == 413
    with pytest.raises(RequestError, match="cut off"):
        decompress(pack(content)[:-5], encoding, limit_bytes=10**6)
    with pytest.raises(RequestError, match="followed by something else"):
        decompress(pack(content) + b"x", encoding, limit_bytes=10**6)
    with pytest.raises(RequestError, match=f"not valid {encoding}"):
        decompress(b"no such thing", encoding, limit_bytes=10**6)


def test_a_decompression_bomb_is_not_unpacked() -> None:
    bomb = zlib.compress(bytes(100 * 1024 * 1024))
    with pytest.raises(RequestError, match="over the limit"):
        decompress(bomb, "deflate", limit_bytes=1024)


def test_an_unknown_encoding_is_refused() -> None:
    assert decompress(b"x", "", limit_bytes=1) == b"x"
    with pytest.raises(RequestError, match="use gzip, deflate or none") as caught:
        decompress(b"x", "br", limit_bytes=10)
    assert caught.value.status == 415


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("br, GZIP;q=0.5", "gzip"),
        ("gzip;q=0, deflate", "deflate"),
        ("identity", ""),
        ("", ""),
    ],
)
def test_an_answer_is_packed_as_its_client_accepts(accepted: str, encoding: str) -> None:
    content = bytes(10_000)
    packed, said = compress(content, accepted)
    assert said == encoding
    assert decompress(packed, said, limit_bytes=len(content)) == content
    assert (len(packed) < 100) == bool(encoding)


def test_a_small_answer_is_not_worth_packing() -> None:
    assert compress(b"short", "gzip") == (b"short", "")


@pytest.mark.parametrize("shape", [[10**9], [1, 10**9], [1000, 1000, 1000]])
def test_a_thousand_million_elements_are_refused_before_memory_is_taken(shape: list[int]) -> None:
    with pytest.raises(RequestError, match="declares shape"):
        parse(one_input(shape=shape), None)
    claimed = one_input(shape=shape, data=None, parameters={"binary_data_size": 10**9})
    with pytest.raises(RequestError, match=r"declares 1000000000, and 0 are left in the body"):
        parse(claimed, str(len(claimed)))
