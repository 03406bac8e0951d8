"""Files are written whole or not at all; tensors are read exactly or refused, and never larger than the file."""

from __future__ import annotations

import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from phi3lora.files import read_pickled, read_tensors, sha256_of, write_atomic


def test_a_write_replaces_the_file_whole_or_leaves_it(tmp_path):
    path = tmp_path / "a"
    write_atomic(path, lambda file: file.write_bytes(b"abc"))
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1

    def fail(file):
        file.write_bytes(b"half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_atomic(path, fail)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"abc")]


def test_tensors_and_metadata_come_back(tmp_path):
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}
    save_file(state, tmp_path / "a.safetensors", {"key": "value"})
    found, metadata = read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"key": "value"} and all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("zipped", [True, False])
def test_nested_containers_of_torch_save_come_back(tmp_path, zipped):
    tensor = torch.arange(4.0)
    value = {"state": {0: {"m": tensor}}, "views": [tensor[1:], tensor.view(2, 2).T], "lr": 0.1, "betas": (0.9, 0.99)}
    torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_pickled(tmp_path / "a.pt")
    assert torch.equal(found["state"][0]["m"], tensor) and torch.equal(found["views"][1], tensor.view(2, 2).T)
    assert (found["lr"], found["betas"]) == (0.1, (0.9, 0.99))


def test_a_tensor_larger_than_its_data_is_refused(tmp_path):
    huge = torch.zeros(1).expand(2**20, 2**20)  # 4 TiB, 4 bytes in the file
    for value in (huge, {"a": [huge]}, {"a": {"b": (torch.ones(1), huge)}}):
        torch.save(value, tmp_path / "a.pt")
        assert (tmp_path / "a.pt").stat().st_size < 10_000
        with pytest.raises(ValueError, match=r"shape \(1048576, 1048576\) that is larger than its data"):
            read_pickled(tmp_path / "a.pt")


def test_a_zip_that_unpacks_to_more_than_it_holds_is_refused(tmp_path):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "a.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "a.pt").stat().st_size < 10_000
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].numel() == 100_000, "torch reads it"
    with pytest.raises(ValueError, match=r"is compressed, which torch\.save does not do"):
        read_pickled(tmp_path / "a.pt")


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.zeros(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_that_are_not_dense_are_refused(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="allowed: dense ones"):
        read_pickled(tmp_path / "a.pt")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": RunsCode()}, "a.pt")
    with pytest.raises(ValueError):
        read_pickled(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"garbage", b"\x80\x02]" * 50, b"\x80\x02cos\nsystem\n.", b"\x80\x02h\x05."]
)
def test_garbage_is_a_value_error(tmp_path, content):
    for path in (tmp_path / "a.pt", tmp_path / "a.safetensors"):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            read_tensors(path)
