import json
import math
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from distrib.checkpoint.codec import decode, encode
from distrib.checkpoint.format import parse_json
from distrib.errors import CheckpointError

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False)
)  # fmt: skip
keys = (
    st.text()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.tuples(st.integers(), st.text())
)
values = st.recursive(
    scalars | st.sets(st.integers()) | st.frozensets(st.text()),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=12,
)


def through_json(value, **kwargs):
    return decode(parse_json(json.dumps(encode(value, "x"), allow_nan=False).encode(), "x"), "x", **kwargs)


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a.items(), b.items(), strict=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(values)
def test_what_comes_back_is_equal_and_of_the_same_types(value):
    assert same(through_json(value), value)


@pytest.mark.parametrize(
    "value",
    [
        {"$": "tensor", "a": 1},
        {1: "a", "1": "b", None: 0, (1, 2): 3},
        Counter({30: 1, 80: 2}),
        OrderedDict([("b", 1), ("a", 2)]),
        torch.Size([2, 3]),
        torch.bfloat16,
        torch.device("cuda:3"),
        -0.0,
        10**5000,
        bytearray(b"\x00\xff"),
        "\ud800 and \x00",
        np.float32(1.5),
        np.bool_(True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_this_value_survives(value):
    found = through_json(value)
    assert type(found) is type(value)
    assert found == value


def test_not_a_number_and_infinity_survive():
    found = through_json([math.nan, math.inf, -math.inf])
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_a_small_tensor_survives(dtype, shape):
    value = torch.ones(shape, dtype=dtype)
    found = through_json([value])[0]
    assert found.dtype is dtype
    assert torch.equal(found, value)


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3).T, np.array(2.5), np.empty((0, 2)), np.array([True])]
)
def test_an_array_survives(array):
    found = through_json(array)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_a_large_tensor_is_spilled_and_fetched():
    shelf = {}

    def spill(path, tensor):
        shelf[path] = tensor
        return path

    tree = encode([{"ema": torch.ones(5000)}], "custom", spill)
    assert list(shelf) == ["custom[0]['ema']"]
    assert torch.equal(decode(tree, "custom", shelf.__getitem__)[0]["ema"], torch.ones(5000))


class Thing:
    pass


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"a": [1, Thing()]}, "state['a'][1]", "Thing"),
        ({"f": len}, "state['f']", "builtin_function_or_method"),
        ((1, {Thing}), "state[1][0]", "type"),
        ({"x": np.array(["text"])}, "state['x']", "numpy value"),
        ({"q": torch.zeros(2, 2).to_sparse()}, "state['q']", "layout"),
    ],
)
def test_what_would_need_pickle_is_refused_with_its_path(value, path, kind):
    with pytest.raises(CheckpointError) as caught:
        encode(value, "state")
    assert caught.value.code == "D0709"
    assert path in caught.value.problem
    assert kind in caught.value.problem


def test_a_value_that_contains_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(CheckpointError, match="contains itself"):
        encode(value, "x")


@pytest.mark.parametrize(
    "tree",
    [
        {"$": "eval", "v": "1"},
        {"$": ["tuple"]},
        {"$": "tensor", "dtype": "F32", "shape": [10**15], "v": ""},
        {"$": "tensor", "dtype": "F32", "shape": [2], "v": "AAAA"},
        {"$": "tensor", "dtype": "object", "shape": [], "v": ""},
        {"$": "numpy", "dtype": "|O", "shape": [1], "v": "AAAAAAAAAAA="},
        {"$": "stored", "v": "model/w"},
        {"$": "dict", "v": [[[1], 2]]},
        {"$": "torch.dtype", "v": "torch.save"},
        {"$": "int", "v": 3},
    ],
)
def test_a_forged_value_is_refused(tree):
    with pytest.raises(CheckpointError) as caught:
        decode(tree, "custom/objects.json")
    assert caught.value.where == "custom/objects.json"


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":1,"a":2}', b"[NaN]", b"[-Infinity]", b"[1e999]", b"\xff", b"", b"{"]
)
def test_bad_json_is_refused(text):
    with pytest.raises(CheckpointError, match="not valid JSON"):
        parse_json(text, "f.json")
