"""Nested containers of tensors: taking tensors out, putting others in, and describing the structure."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict, UserList, defaultdict, namedtuple
from collections.abc import Iterator, Mapping, MutableMapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st

from distrib.collectives.trees import map_tensors, replace_tensors, structure, tensors


class Pair(NamedTuple):
    first: Any
    second: Any


Untyped = namedtuple("Untyped", ["a", "b"])


@dataclasses.dataclass
class Record:
    x: Any
    y: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Any
    y: Any


@dataclasses.dataclass
class Derived:
    """A dataclass whose constructor takes other arguments than it has fields."""

    start: dataclasses.InitVar[float]
    x: Any = dataclasses.field(init=False)

    def __post_init__(self, start):
        self.x = torch.full((2,), start)


class Encoding(UserDict):
    """As a tokenizer's output: a mapping with attributes, whose constructor takes more than its items."""

    def __init__(self, data: dict, encodings: list[str], n_sequences: int):
        super().__init__(data)
        self.encodings, self.n_sequences = encodings, n_sequences

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class Output(OrderedDict):
    """As a model's output: a mapping whose items are attributes too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class ReadOnly(Mapping):
    """A mapping without a way of writing."""

    def __init__(self, inside: dict):
        self.inside = inside

    def __getitem__(self, key: str) -> Any:
        return self.inside[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inside)

    def __len__(self) -> int:
        return len(self.inside)


class Holder(MutableMapping):
    """A mapping around a dict of its own, without a way of copying that knows about it."""

    def __init__(self, **items: Any):
        self.items_inside = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self.items_inside[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.items_inside[key] = value

    def __delitem__(self, key: str) -> None:
        del self.items_inside[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_inside)

    def __len__(self) -> int:
        return len(self.items_inside)


def t(*shape: int, dtype: torch.dtype = torch.float32, value: float = 1.0) -> torch.Tensor:
    return torch.full(shape, value).to(dtype)


def doubled(tree: Any) -> Any:
    return map_tensors(lambda x: x * 2, tree)


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
leaves = st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), shapes, dtypes)
constants = st.sampled_from([None, 1, 2.5, "word", True])
names = st.sampled_from(["a", "b", "c"])


def containers(children: st.SearchStrategy) -> st.SearchStrategy:
    items = st.dictionaries(names, children, max_size=3)
    return st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        items,
        items.map(OrderedDict),
        items.map(UserDict),
        items.map(lambda x: Encoding(x, ["e"], 1)),
        st.builds(Pair, children, children),
        st.builds(Record, children, children),
        st.builds(Frozen, children, children),
        st.builds(Slotted, children, children),
    )


trees = st.recursive(leaves | constants, containers, max_leaves=8)


def parts(tree: Any) -> list[tuple[Any, Any]] | None:
    """Say what the contract calls a container, in our own words: (key, child) in order; None for a leaf."""
    if isinstance(tree, (dict, UserDict)):
        return [(key, tree[key]) for key in tree]
    if isinstance(tree, (list, tuple)):
        return list(enumerate(tree))
    if dataclasses.is_dataclass(tree):
        return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    return None


def flat(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [x for _, child in parts(tree) or [] for x in flat(child)]


def compatible(a: Any, b: Any, *, ragged: bool) -> bool:
    """Whether two ranks may bring `a` and `b` to one collective."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if ragged:  # a 0-d tensor counts as (1,)
            a, b = torch.atleast_1d(a), torch.atleast_1d(b)
        return a.dtype is b.dtype and a.dim() == b.dim() and a.shape[ragged:] == b.shape[ragged:]
    children = list(zip(parts(a) or [], parts(b) or [], strict=False))
    return len(parts(a) or []) == len(parts(b) or []) and all(
        left == right and compatible(x, y, ragged=ragged) for (left, x), (right, y) in children
    )


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, container types and constants included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype is b.dtype and torch.equal(a, b)
    if parts(a) is None:
        return bool(a == b)
    return compatible(a, b, ragged=False) and all(
        same(x, y) for (_, x), (_, y) in zip(parts(a) or [], parts(b) or [], strict=True)
    )


@given(tree=trees)
@settings(deadline=None)
def test_the_tensors_come_out_in_the_order_of_the_containers(tree: Any):
    found = tensors(tree)
    assert len(found) == len(flat(tree))
    for x, y in zip(found, flat(tree), strict=True):
        assert x is y


@given(tree=trees)
@settings(deadline=None)
def test_mapping_the_identity_gives_an_equal_tree(tree: Any):
    assert same(map_tensors(lambda x: x, tree), tree)


@given(tree=trees)
@settings(deadline=None)
def test_each_tensor_is_mapped_once_and_the_original_stays_as_it_was(tree: Any):
    before = copy.deepcopy(tree)
    seen: list[torch.Tensor] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.full((9,), 7.0)

    mapped = map_tensors(note, tree)
    assert [id(x) for x in seen] == [id(x) for x in flat(tree)]
    assert same(tree, before)
    for x in flat(mapped):
        assert x.shape == (9,)


@given(tree=trees)
@settings(deadline=None)
def test_replacing_the_tensors_by_themselves_gives_an_equal_tree(tree: Any):
    assert same(replace_tensors(tree, iter(tensors(tree))), tree)


@given(a=trees, b=trees, ragged=st.booleans())
@settings(deadline=None, max_examples=150)
def test_equal_text_means_compatible_trees(a: Any, b: Any, ragged: bool):
    equal = structure(a, ragged=ragged) == structure(b, ragged=ragged)
    assert equal == compatible(a, b, ragged=ragged)


@given(tree=trees, data=st.data())
@settings(deadline=None)
def test_trees_that_differ_in_dim_0_only_have_equal_ragged_text(tree: Any, data: st.DataObject):
    def resized(x: torch.Tensor) -> torch.Tensor:
        rows = data.draw(st.integers(0, 4))
        return torch.zeros((rows, *x.shape[1:]), dtype=x.dtype) if x.dim() else x

    other = map_tensors(resized, tree)
    assert structure(other, ragged=True) == structure(tree, ragged=True)
    if [x.shape for x in flat(other)] != [x.shape for x in flat(tree)]:
        assert structure(other, ragged=False) != structure(tree, ragged=False)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (t(2), t(3)),
        (t(2), t(2, dtype=torch.float64)),
        (t(2), t(2, 1)),
        (t(), t(1)),
        ({"a": t(1)}, {"b": t(1)}),
        ({"a": t(1), "b": t(1)}, {"b": t(1), "a": t(1)}),
        ({"a": t(1)}, OrderedDict(a=t(1))),
        ([t(1)], (t(1),)),
        ([t(1)], [t(1), t(1)]),
        ([t(1), []], [t(1)]),
        (Pair(t(1), t(1)), (t(1), t(1))),
        (Record(t(1)), Record(t(1), t(1))),
        (Record(t(1)), {"x": t(1), "y": None}),
        (t(1), 1.0),
        (None, t(1)),
    ],
    ids=repr,
)
def test_incompatible_trees_have_different_text(a: Any, b: Any):
    assert structure(a, ragged=False) != structure(b, ragged=False)


def test_the_text_is_short_and_readable():
    tree = {"loss": t(), "logits": [t(4, 3, dtype=torch.bfloat16), "note"]}
    assert structure(tree, ragged=False) == "dict[loss: float32(), logits: list[0: bfloat16(4, 3), 1: str]]"
    assert structure(tree, ragged=True) == "dict[loss: float32(*), logits: list[0: bfloat16(*, 3), 1: str]]"


def test_a_key_that_looks_like_the_text_of_another_tree_is_told_apart():
    assert structure({"a": t(1), "b": t(1)}, ragged=False) != structure(
        {"a: float32(1), b": t(1)}, ragged=False
    )


def test_named_tuples_keep_their_type_and_names():
    found = doubled((Pair(t(2), "x"), Untyped(t(1), [t(1)])))
    assert isinstance(found[0], Pair)
    assert isinstance(found[1], Untyped)
    assert found[0].first.tolist() == [2, 2]
    assert found[1].b[0].tolist() == [2]


def test_torchs_own_named_results_are_mapped():
    found = doubled(torch.tensor([[1.0, 3.0]]).max(dim=1))
    assert [x.tolist() for x in found] == [[6.0], [2]]


@pytest.mark.parametrize("cls", [Record, Frozen, Slotted])
def test_a_dataclass_is_copied_without_calling_its_constructor_again(cls: type):
    given_one = cls(t(1), "kept")
    found = doubled(given_one)
    assert type(found) is cls
    assert (found.x.tolist(), found.y) == ([2], "kept")
    assert given_one.x.tolist() == [1]


def test_a_dataclass_whose_constructor_takes_other_arguments_is_mapped():
    assert doubled(Derived(3.0)).x.tolist() == [6, 6]


def test_a_dataclass_as_a_class_is_a_constant():
    assert map_tensors(lambda x: x, Record) is Record
    assert structure(Record, ragged=False) == "type"


def test_a_mapping_keeps_the_attributes_that_its_constructor_needs():
    encoding = Encoding({"ids": t(2), "mask": t(2)}, ["e"], 2)
    found = doubled(encoding)
    assert isinstance(found, Encoding)
    assert (found.encodings, found.n_sequences) == (["e"], 2)
    assert found.ids.tolist() == [2, 2]
    assert encoding.ids.tolist() == [1, 1]


def test_a_model_output_has_the_new_tensors_as_items_and_attributes():
    output = Output(loss=t(), logits=t(2))
    found = doubled(output)
    assert isinstance(found, Output)
    assert (float(found.loss), float(found["loss"])) == (2, 2)
    assert float(output.loss) == 1


def test_a_default_dict_keeps_its_factory():
    found = doubled(defaultdict(list, a=[t(1)]))
    assert found["a"][0].tolist() == [2]
    assert found["missing"] == []


def test_an_ordered_dict_keeps_its_order():
    tree = OrderedDict(b=t(1), a=t(1))
    tree.move_to_end("b")
    assert list(doubled(tree)) == ["a", "b"]


@pytest.mark.parametrize("cls", [ReadOnly, MappingProxyType])
def test_a_mapping_that_cannot_be_written_to_becomes_a_dict(cls: type):
    found = doubled(cls({"a": t(1)}))
    assert type(found) is dict
    assert found["a"].tolist() == [2]


def test_a_mapping_around_a_dict_of_its_own_is_not_changed():
    holder = Holder(a=t(1))
    found = doubled(holder)
    assert found["a"].tolist() == [2]
    assert holder["a"].tolist() == [1]


def test_keys_of_any_type_are_kept():
    tree: Mapping[Any, Any] = {1: t(1), ("a", 2): t(1), None: [t(1)]}
    assert list(doubled(tree)) == [1, ("a", 2), None]


@pytest.mark.parametrize(
    "constant", [None, 3, "text", b"bytes", {1, 2}, SimpleNamespace(x=1), torch.float32, range(3), object()]
)
def test_anything_else_is_a_constant_and_comes_back_itself(constant: Any):
    assert map_tensors(lambda x: x * 2, constant) is constant
    assert map_tensors(lambda x: x * 2, [constant])[0] is constant
    assert tensors(constant) == []


def test_a_list_that_is_no_list_is_a_constant():
    tree = UserList([t(1)])
    assert tensors(tree) == []
    assert map_tensors(lambda x: x * 2, tree) is tree


def test_a_tensor_that_occurs_twice_is_taken_out_twice():
    x = t(1)
    assert [id(y) for y in tensors({"a": x, "b": [x]})] == [id(x)] * 2


def test_deep_nesting_is_followed():
    tree: Any = t(1)
    for _ in range(100):
        tree = [{"a": tree}]
    assert tensors(doubled(tree))[0].tolist() == [2]
