import os

import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import given, strategies as st

from distrib.checkpoint.format import DTYPES
from distrib.checkpoint.plan import numel
from distrib.checkpoint.storage import Storage
from distrib.checkpoint.tensorfile import Entry, chunks, in_file_order, write_tensors
from distrib.checkpoint.transfer import read_box, sub_tensor
from distrib.errors import CheckpointError
from distrib.state import Box

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def random_bytes(shape, dtype):
    size = numel(shape) * dtype.itemsize
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def raw(tensor):
    return b"".join(map(bytes, chunks(tensor)))


def entry(key, code, tensor):
    return Entry(key, tuple(tensor.shape), code, lambda: tensor)


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda x: x != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES)), shapes),
        max_size=6,
    )
)
def test_the_safetensors_library_reads_what_we_write(tmp_path_factory, wanted):
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    tensors = {key: (code, random_bytes(shape, DTYPES[code])) for key, (code, shape) in wanted.items()}
    ordered = sorted(tensors.items(), key=lambda item: in_file_order(item[1][0], item[0]))
    written = write_tensors(Storage(), path, [entry(key, *x) for key, x in ordered], durable=False)
    found = safetensors.torch.load_file(path)
    assert {key: (x.dtype, tuple(x.shape), raw(x)) for key, x in found.items()} == {
        key: (x.dtype, tuple(x.shape), raw(x)) for key, (_, x) in tensors.items()
    }
    assert written.record.size == path.stat().st_size


def test_checksums_are_those_of_the_bytes_on_disk(tmp_path):
    tensor = torch.randn(3, 4)
    written = write_tensors(Storage(), tmp_path / "x", [entry("w", "F32", tensor)], durable=True)
    data, ((offset, xxh3),) = (tmp_path / "x").read_bytes(), written.parts
    assert xxh3 == xxhash.xxh3_64_hexdigest(data[offset:])
    assert written.record.xxh3 == xxhash.xxh3_64_hexdigest(data[: written.record.hashed])
    assert offset % 64 == 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 6).T,
        torch.randn(8)[::2],
        torch.randn(4, 3)[1:2, :1],
        torch.randn(3, dtype=torch.complex64).conj(),
    ],
)
def test_a_tensor_that_is_not_contiguous_is_written_row_major(tmp_path, tensor):
    code = "C64" if tensor.is_complex() else "F32"
    write_tensors(Storage(), tmp_path / "x", [entry("w", code, tensor)], durable=False)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x")["w"], tensor.resolve_conj())


def test_a_tensor_larger_than_a_chunk_is_written_in_parts(tmp_path):
    class Counting(Storage):
        writes = 0

        def write(self, file, data):
            self.writes += 1
            assert len(data) <= 2**20
            super().write(file, data)

    storage, tensor = Counting(), torch.randn(900_000)
    write_tensors(storage, tmp_path / "x", [entry("w", "F32", tensor)], durable=False)
    assert storage.writes == 5
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x")["w"], tensor)


def test_a_tensor_that_changed_size_meanwhile_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"'w'.*announced as F32"):
        write_tensors(
            Storage(), tmp_path / "x", [Entry("w", (3,), "F32", lambda: torch.zeros(4))], durable=False
        )


def test_two_tensors_with_one_key_are_refused(tmp_path):
    entries = [entry("w[0:1]", "F32", torch.zeros(1))] * 2
    with pytest.raises(CheckpointError, match=r"two tensors would have the name 'w\[0:1\]'"):
        write_tensors(Storage(), tmp_path / "x", entries, durable=False)


def test_a_file_is_never_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "x").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_tensors(Storage(), tmp_path / "x", [], durable=False)
    assert (tmp_path / "victim").read_text() == "mine"


def test_files_get_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(Storage(), tmp_path / "x", [], durable=False)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@st.composite
def boxes(draw):
    shape = draw(st.lists(st.integers(1, 7), max_size=4).map(tuple))
    bounds = [sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in shape]
    return shape, Box(tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))


@given(boxes(), st.booleans(), st.integers(1, 64))
def test_any_box_is_read_into_any_target(drawn, transposed, limit):
    shape, box = drawn
    stored = torch.arange(numel(shape), dtype=torch.int32).reshape(shape)
    data = b"head" + raw(stored)
    target = torch.zeros(tuple(reversed(box.size)), dtype=torch.int32).permute(
        tuple(reversed(range(len(shape))))
    )
    target = target if transposed else target.contiguous()
    reads = []

    def read(view, at):
        reads.append(len(view))
        view[:] = data[at : at + len(view)]

    read_box(read, 4, shape, box, target, staging=limit * 4, sparse=limit)
    assert torch.equal(target, sub_tensor(stored, box))


def test_few_columns_of_a_wide_tensor_are_read_row_by_row():
    stored = torch.zeros(4, 200_000)
    reads = []

    def read(view, at):
        reads.append(len(view))

    read_box(read, 0, (4, 200_000), Box((0, 10), (4, 5)), torch.zeros(4, 5))
    assert sum(reads) == 4 * 5 * stored.element_size()
