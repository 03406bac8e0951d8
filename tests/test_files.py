"""Files are written whole or not at all; tensors are read exactly or refused, and never larger than the file."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3lora import files
from phi3lora.files import (
    is_leftover,
    read_pickled,
    read_tensors,
    sha256_of,
    tensor_file,
    write_atomic,
    write_folder,
)


@pytest.fixture(autouse=True)
def no_fsync():
    """Wait for the disk here."""


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


def killed(action: Callable[[], object]) -> None:
    """Run ``action``, which sends its process SIGKILL, in a child."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_write_left_is_deleted_by_the_next(tmp_path):
    """Files of processes that run stay, and so do a user's files of similar names."""
    path = tmp_path / "a"
    killed(lambda: write_atomic(path, lambda file: (file.write_bytes(b"half"), kill())))
    (left,) = tmp_path.iterdir()
    assert is_leftover(left.name)
    others = [f".a.{os.getppid()}.tmp", ".a.b.tmp", ".a.tmp", "a.1.tmp", ".ab.999999999.tmp"]
    for name in others:
        (tmp_path / name).touch()
    write_atomic(path, lambda file: file.write_bytes(b"whole"))
    assert {file.name for file in tmp_path.iterdir()} == {"a", *others}


# --- Folders


def fill(version: str, *names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in names or ("config", "weights"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(version)

    return write


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_is_replaced_whole_and_a_user_s_files_stay(tmp_path):
    folder = tmp_path / "new" / "a"
    write_folder(folder, fill("1", "config", "weights-1", "weights-2", "more/x"), marker="config")
    (folder / "notes.txt").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_text("mine")
    (folder / "link").symlink_to("notes.txt")
    folder.chmod(0o750)
    write_folder(folder, fill("2", "config", "weights-1"), marker="config", replaces=["weights-*"])
    mine = {"notes.txt": "mine", "runs/log": "mine", "link": "mine"}
    assert contents(folder) == {"config": "2", "weights-1": "2", "more/x": "1", **mine}
    assert os.readlink(folder / "link") == "notes.txt" and folder.stat().st_mode & 0o777 == 0o750
    assert [file.name for file in folder.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_folder_that_fails_is_as_it_was(tmp_path, monkeypatch, exchange):
    """Whatever fails: the writing, the flushing, the renaming."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    folder = tmp_path / "a"
    write_folder(folder, fill("1"), marker="config")
    (folder / "notes.txt").write_text("mine")
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("full")

    attempts = [(None, lambda folder: (fill("2", "config")(folder), fail()))]
    attempts += [((files, "fsync"), fill("2"))] + ([] if exchange else [((Path, "rename"), fill("2"))])
    for place, write in attempts:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            if place:
                patch.setattr(*place, fail)
            write_folder(folder, write, marker="config")
        assert contents(tmp_path) == before


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_folder_killed_at_any_step_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, exchange):
    """Without an exchange there is one moment between two renames, when ``.a.old`` has the old one."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    steps = [(files, "fsync", n) for n in range(5)] + [(os, "link", 0), (files.shutil, "rmtree", 0)]
    steps += [] if exchange else [(Path, "rename", n) for n in range(3)]
    seen = set()
    for number, (module, name, count) in enumerate(steps):
        folder = tmp_path / str(number) / "a"
        write_folder(folder, fill("1"), marker="config")
        (folder / "notes.txt").write_text("mine")

        def write(module=module, name=name, count=count, folder=folder) -> None:
            real, calls = getattr(module, name), []

            def die_at(*arguments, **options):
                calls.append(name)
                return kill() if len(calls) > count else real(*arguments, **options)

            monkeypatch.setattr(module, name, die_at)
            write_folder(folder, fill("2"), marker="config")

        killed(write)
        at = folder if folder.exists() else folder.with_name(".a.old")
        found = contents(at)
        assert found.pop("notes.txt") == "mine"
        assert found in ({"config": "1", "weights": "1"}, {"config": "2", "weights": "2"})
        assert exchange is False or at == folder
        seen.add(found["config"])
        write_folder(folder, fill("3"), marker="config")
        assert contents(folder)["config"] == "3"
        assert {file.name for file in folder.parent.iterdir()} == {"a"}
    assert seen == {"1", "2"}


def test_the_current_folder_is_filled_without_being_renamed(tmp_path, monkeypatch):
    """A shell or notebook in it stays in it. A kill leaves it without the file that says what it is."""
    folder = tmp_path / "a"
    write_folder(folder, fill("1", "config", "weights-1", "weights-2", "more/x"), marker="config")
    (folder / "sub").mkdir()
    (folder / "notes.txt").write_text("mine")
    monkeypatch.chdir(folder / "sub")
    write_folder(Path(".."), fill("2", "config", "weights-1", "more/x"), marker="config", replaces=["weights-*"])
    assert Path.cwd() == folder / "sub" and Path("../config").read_text() == "2"
    assert contents(folder) == {"config": "2", "weights-1": "2", "more/x": "2", "notes.txt": "mine"}
    real = os.replace

    def write() -> None:
        monkeypatch.setattr(os, "replace", lambda source, target: kill() if target.name == "weights-1" else None)
        write_folder(folder, fill("3", "config", "weights-1"), marker="config")

    killed(write)
    assert os.replace is real and "config" not in contents(folder)


def test_tensors_and_metadata_come_back(tmp_path):
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}
    save_file(state, tmp_path / "a.safetensors", {"key": "value"})
    found, metadata = read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"key": "value"} and all(torch.equal(found[name], state[name]) for name in state)


def test_nested_containers_of_torch_save_come_back(tmp_path):
    tensor = torch.arange(4.0)
    value = {"state": {0: {"m": tensor}}, "views": [tensor[1:], tensor.view(2, 2).T], "lr": 0.1, "betas": (0.9, 0.99)}
    more = {"none": None, "flags": [True, False], "big": [2**40, -(2**70), 300, -1], "deep": {"a": {"b": ((),)}}}
    torch.save({**value, **more}, tmp_path / "a.pt")
    found = read_pickled(tmp_path / "a.pt")
    assert torch.equal(found["state"][0]["m"], tensor) and torch.equal(found["views"][1], tensor.view(2, 2).T)
    assert (found["lr"], found["betas"]) == (0.1, (0.9, 0.99)) and {name: found[name] for name in more} == more


DTYPES = """float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 complex64 complex128
    int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool""".split()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_that_torch_saves_comes_back_with_its_bits(tmp_path, dtype):
    """Also empty tensors, scalars, Parameters, state dicts with their attributes, and other strides."""
    tensor = torch.zeros(4, 32, dtype=torch.uint8).random_(0, 2).view(getattr(torch, dtype))
    state = torch.nn.Linear(2, 2).state_dict()
    state.update(a=tensor, b=tensor.T, c=tensor[1:, :0], d=tensor.flatten()[0], e=torch.nn.Parameter(torch.ones(2)))
    torch.save(state, tmp_path / "a.pt")
    found, want = read_tensors(tmp_path / "a.pt")[0], torch.load(tmp_path / "a.pt", weights_only=True)
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].stride() == tensor.stride()
        assert bits(found[name]) == bits(tensor)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


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


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Rewrite an archive member by member; None leaves a member out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            changed = change(name.partition("/")[2], data)
            if changed is not None:
                archive.writestr(name, changed)


def storage_of(count: int, key: str = "0", dtype: type = torch.FloatStorage) -> bytes:
    """A pickle of {"a": tensor of ``count`` numbers} whose storage says that it has them."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", dtype, key, "cpu", count) if value == "STORAGE" else None

    class Described:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, ("STORAGE", 0, (count,), (1,), False, OrderedDict())

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"a": Described()})
    return buffer.getvalue()


@pytest.mark.parametrize("count", [2**40, 1025, 1023, 0, -1])
def test_a_storage_is_as_large_as_its_member(tmp_path, count):
    """torch believes the pickle: it reads memory behind the member's, which may hold what the process freed."""
    torch.save({"a": torch.zeros(1024)}, tmp_path / "a.pt")
    rewrite(tmp_path / "a.pt", lambda name, data: storage_of(1024) if name == "data.pkl" else data)
    assert torch.equal(read_tensors(tmp_path / "a.pt")[0]["a"], torch.zeros(1024)), "the forger works"
    rewrite(tmp_path / "a.pt", lambda name, data: storage_of(count) if name == "data.pkl" else data)
    with pytest.raises(ValueError, match="larger than its data, or of another dtype"):
        read_tensors(tmp_path / "a.pt")


def test_a_storage_without_a_member_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1024)}, tmp_path / "a.pt")
    rewrite(tmp_path / "a.pt", lambda name, data: None if name == "data/0" else data)
    with pytest.raises(ValueError, match="data/0"):
        read_tensors(tmp_path / "a.pt")


def test_the_older_format_is_refused_with_the_way_out(tmp_path, monkeypatch):
    """It has the numbers behind the pickle, as many as the pickle says."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    for name in ("a.pt", "a.bin"):
        path = path.rename(tmp_path / name)
        with pytest.raises(ValueError, match=r"no whole zip archive.*; to convert a file that you trust: torch\.save"):
            read_tensors(path)
    torch.save(torch.load(path, weights_only=True), path)
    assert torch.equal(read_tensors(path)[0]["a"], torch.arange(3.0))


@pytest.mark.parametrize("packed", ["", "PK\5\6", "PK\5\6" + "\0" * 18, "\0" * 70_000])
def test_a_zip_that_hides_behind_trailing_bytes_unpacks_nothing(tmp_path, packed):
    """Python's zipfile and torch's reader find the archive's end in different ways; one reader decides here."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(1_000_000)}, path)
    with zipfile.ZipFile(path) as plain:
        members = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with path.open("ab") as file:
        file.write(packed.encode())
    with pytest.raises(ValueError, match=r"is compressed, which|no whole zip archive|no data\.pkl"):
        read_tensors(path)


def test_members_that_overlap_are_refused(tmp_path):
    """A thousand names for the same bytes would be a thousand tensors."""
    path = tmp_path / "a.pt"
    torch.save({str(i): torch.full((1000,), float(i)) for i in range(20)}, path)
    archive = zipfile.ZipFile(path, "a")
    first = archive.getinfo("a/data/0")
    for i in range(1, 20):
        other = archive.getinfo(f"a/data/{i}")
        other.header_offset = first.header_offset
    archive._didModify = True
    archive.close()
    with pytest.raises(ValueError):
        read_tensors(path)


def test_tensors_that_share_their_numbers_are_bounded(tmp_path):
    """Two names of one tensor are tied weights; a thousand would be gigabytes once they are copied."""
    tensor = torch.zeros(1000)
    torch.save({"a": tensor, "b": tensor}, tmp_path / "a.pt")
    assert read_tensors(tmp_path / "a.pt")[0].keys() == {"a", "b"}
    torch.save({str(i): tensor for i in range(1000)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="its tensors share their numbers: they describe 4,000,000 bytes, it has"):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "value",
    [bytearray(2**16), {1, 2}, torch.Size([1]), torch.float32, complex(1, 2), b"bytes", {(1, 2): 3}, range(3)],
    ids=lambda value: type(value).__name__,
)
def test_other_objects_are_refused_before_they_are_built(tmp_path, value, monkeypatch):
    """``bytearray(3 GiB)`` is an instruction of 20 bytes, and torch's own reader executes it."""
    torch.save({"a": value}, tmp_path / "a.pt")
    if isinstance(value, torch.dtype):
        assert read_pickled(tmp_path / "a.pt") == {"a": value}
        return
    with pytest.raises(ValueError, match=r"none of torch's tensors.*allowed: dense ones"):
        read_pickled(tmp_path / "a.pt")


def test_a_flipped_bit_in_the_numbers_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(1000.0)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_tensor_file_has_the_same_bytes_for_the_same_contents(tmp_path, suffix):
    state = {"b": torch.eye(3, dtype=torch.bfloat16), "a": torch.arange(6.0)}
    facts = {"phi3lora": '{"r": 4}', "other": "é"}
    files = {tensor_file(suffix, dict(state), dict(facts)) for _ in range(20)}
    (data,) = files
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    found, metadata = read_tensors(path)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert facts.items() <= metadata.items()
    options = [{}, {"weights_only": False}, {"mmap": True}]
    theirs = [load_file(path)] if suffix == ".safetensors" else [torch.load(path, **more) for more in options]
    for read in theirs:
        assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def test_a_reader_sees_one_file_although_it_is_replaced(tmp_path, monkeypatch):
    """Tensors and metadata come from one opening: never the numbers of one adapter with the alpha of another."""
    path = tmp_path / "a.safetensors"
    opened = []
    real = io.open

    def replace_once_read(file, *arguments, **options):
        opened.append(os.fspath(file))
        handle = real(file, *arguments, **options)
        os.replace(tmp_path / "new", path) if (tmp_path / "new").exists() else None
        return handle

    for suffix in (".safetensors", ".pt"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(tensor_file(suffix, {"a": torch.zeros(3)}, {"alpha": "0"}))
        (tmp_path / "new").write_bytes(tensor_file(suffix, {"a": torch.ones(3)}, {"alpha": "1"}))
        with monkeypatch.context() as patch:
            patch.setattr(io, "open", replace_once_read)
            patch.setattr("builtins.open", replace_once_read)
            tensors, metadata = read_tensors(path)
        assert torch.equal(tensors["a"], torch.full((3,), float(metadata["alpha"])))


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
