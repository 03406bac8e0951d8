"""Checkpoints: whole or not at all, checked before use, all tensors, rotated without losing the best."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import adapted_model, adapters_of, chat_dataset, quiet_config, same_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phi3lora as p3
from phi3lora.training import checkpoint as module
from phi3lora.training.checkpoint import (
    checkpoints,
    damage,
    find_checkpoint,
    newest_good_checkpoint,
    rng_state,
    rotate,
    set_rng_state,
)

FILES = [
    "lora.safetensors",
    "lora_config.json",
    "manifest.json",
    "optimizer.pt",
    "rng_state_0.pth",
    "scheduler.pt",
    "trainer_state.json",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps with checkpoints 2, 4, 6; its adapters."""
    folder = tmp_path_factory.mktemp("finished")
    model = adapted_model(lora_dropout=0.1)
    p3.train(model, chat_dataset(), quiet_config(folder, max_steps=6, save_strategy="steps", save_steps=2))
    return folder, adapters_of(model)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_a_checkpoint_has_exactly_the_files_of_the_design_and_nothing_is_left_beside_it(finished):
    run, _ = finished
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for path in checkpoints(run):
        assert sorted(p.name for p in path.iterdir()) == FILES


def test_the_manifest_holds_the_sha256_of_every_other_file(finished):
    for path in checkpoints(finished[0]):
        listed = json.loads((path / "manifest.json").read_text())["sha256"]
        files = [name for name in FILES if name != "manifest.json"]
        assert listed == {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in files}
        assert damage(path) is None


def test_every_tensor_file_is_read_by_torch_load_weights_only(finished):
    newest = checkpoints(finished[0])[0]
    read = {p.name for p in newest.iterdir() if p.suffix in (".pt", ".pth") and torch.load(p, weights_only=True)}
    assert read == {"optimizer.pt", "scheduler.pt", "rng_state_0.pth"}


def test_the_checkpoints_adapter_file_is_one_for_load_adapter(finished):
    model = adapted_model(seed=1)
    p3.load_adapter(model, finished[0] / "checkpoint-6" / "lora.safetensors")
    assert same_tensors(adapters_of(model), finished[1])


def test_the_state_file_says_config_step_and_versions(finished):
    about = json.loads((finished[0] / "checkpoint-4" / "trainer_state.json").read_text())
    assert about["state"]["global_step"] == 4
    assert [line["step"] for line in about["state"]["history"]] == [1, 2, 3, 4]
    assert p3.TrainingConfig(**about["config"]).max_steps == 6
    assert about["versions"]["torch"] == torch.__version__


def test_checkpoints_are_ordered_by_step_not_by_name_and_strangers_are_left_out(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-7.bak", "checkpoint-", ".checkpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-500").write_text("a file")
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]
    assert checkpoints(tmp_path / "nowhere") == []


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


DAMAGES = {"bit flipped": flip_bit, "truncated": truncate, "empty": empty, "missing": Path.unlink}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_for_the_newest_good_one(folder, caplog, name, how):
    DAMAGES[how](folder / "checkpoint-6" / name)
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        assert newest_good_checkpoint(folder) == folder / "checkpoint-4"
    (warning,) = caplog.messages
    assert "checkpoint-6" in warning
    assert name in warning or (name, how) == ("manifest.json", "bit flipped")  # which file's line that hits varies


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_noticed(folder, data):
    path = folder / "checkpoint-6" / data.draw(st.sampled_from([n for n in FILES if n != "manifest.json"]))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    assert damage(folder / "checkpoint-6") == f"{path.name} is not what was written"
    path.write_bytes(content)


def test_a_manifest_that_lists_nothing_is_no_sign_of_a_whole_checkpoint(folder):
    (folder / "checkpoint-6" / "manifest.json").write_text('{"format": 1, "sha256": {}}')
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    assert newest_good_checkpoint(folder) == folder / "checkpoint-4"


def test_all_damaged_means_none_and_resuming_says_so(folder):
    for path in checkpoints(folder):
        (path / "manifest.json").unlink()
    assert newest_good_checkpoint(folder) is None
    assert find_checkpoint(quiet_config(folder, resume_from_checkpoint="auto")) is None
    with pytest.raises(p3.CheckpointError, match="no good checkpoint"):
        find_checkpoint(quiet_config(folder, resume_from_checkpoint=True))
    with pytest.raises(p3.CheckpointError, match=r"cannot resume from .*checkpoint-6.*manifest"):
        find_checkpoint(quiet_config(folder, resume_from_checkpoint=str(folder / "checkpoint-6")))


def test_training_resumes_from_the_newest_good_one_and_overwrites_the_damaged(folder, finished):
    flip_bit(folder / "checkpoint-6" / "optimizer.pt")
    model, steps = adapted_model(seed=1, lora_dropout=0.1), []

    class Watch(p3.Callback):
        def on_step_end(self, state):
            steps.append(state.global_step)

    config = quiet_config(folder, max_steps=6, save_strategy="steps", save_steps=2, resume_from_checkpoint=True)
    p3.train(model, chat_dataset(), config, callbacks=[Watch()])
    assert steps == [5, 6]
    assert same_tensors(adapters_of(model), finished[1])
    assert damage(folder / "checkpoint-6") is None


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "sub/file", "./optimizer.pt"])
def test_a_manifest_that_points_outside_its_folder_is_refused(folder, name):
    (folder / "secret").write_text("x")
    path = folder / "checkpoint-6" / "manifest.json"
    manifest = json.loads(path.read_text())
    target = folder / "checkpoint-6" / name
    content = target.read_bytes() if target.is_file() else b""
    manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(manifest))
    assert name in damage(folder / "checkpoint-6")


class Pickled:
    """Loading it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state_0.pth"])
def test_nothing_in_a_checkpoint_is_executed(folder, name):
    bad, witness = folder / "checkpoint-6", folder / "executed"
    torch.save(Pickled(witness), bad / name)
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256((bad / name).read_bytes()).hexdigest()
    (bad / "manifest.json").write_text(json.dumps(manifest))
    config = quiet_config(folder, max_steps=6, save_strategy="steps", save_steps=2, resume_from_checkpoint=True)
    with pytest.raises(p3.CheckpointError, match="cannot read"):
        p3.train(adapted_model(lora_dropout=0.1), chat_dataset(), config)
    assert not witness.exists()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.sets(st.integers(1, 120), min_size=1, max_size=7),
    keep=st.one_of(st.none(), st.integers(1, 8)),
    data=st.data(),
)
def test_rotation_keeps_the_newest_and_the_best_and_no_more_than_asked(tmp_path_factory, steps, keep, data):
    folder = tmp_path_factory.mktemp("rotation")
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
    best = data.draw(st.one_of(st.none(), st.sampled_from(sorted(steps))))
    deleted = rotate(folder, keep, None if best is None else f"checkpoint-{best}")
    newest_first = sorted(steps, reverse=True)
    kept = {newest_first[0]} | ({best} if best is not None else set())
    for step in newest_first:
        if keep is None or len(kept) < keep:
            kept.add(step)
    left = {int(p.name.removeprefix("checkpoint-")) for p in folder.iterdir()}
    assert left == kept
    assert {p.name for p in deleted} == {f"checkpoint-{step}" for step in steps - kept}


def test_a_run_keeps_as_many_checkpoints_as_save_total_limit(tmp_path):
    config = quiet_config(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2)
    p3.train(adapted_model(), chat_dataset(), config)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-4"]


@pytest.mark.parametrize("function", ["rename", "json", "fsync"])
def test_a_crash_while_saving_leaves_the_earlier_checkpoints_whole_and_no_half_one(tmp_path, monkeypatch, function):
    def crash(real, hit):
        def call(*args, **kwargs):
            if hit(*args):
                raise OSError("disk full")
            return real(*args, **kwargs)

        return call

    if function == "rename":
        monkeypatch.setattr(Path, "rename", crash(Path.rename, lambda source, *_: "checkpoint-4" in source.name))
    elif function == "json":
        at = "checkpoint-4"
        monkeypatch.setattr(module, "_write_json", crash(module._write_json, lambda p, *_: at in p.parent.name))
    else:
        monkeypatch.setattr(module, "fsync", crash(module.fsync, lambda path: "checkpoint-4" in path.parent.name))
    config = quiet_config(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    with pytest.raises(p3.CheckpointError, match="disk full"):
        p3.train(adapted_model(), chat_dataset(), config)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert damage(tmp_path / "checkpoint-2") is None
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


class FullDisk:
    """After ``allowed`` bytes in files under a folder every write there fails, as on a disk without space."""

    def __init__(self, monkeypatch, step):
        real = module._write_files

        def write(run, state, folder):
            if state.global_step in step:
                real(run, state, folder)
                (folder / "optimizer.pt").write_bytes(b"")  # half written
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(run, state, folder)

        monkeypatch.setattr(module, "_write_files", write)


def test_a_full_disk_is_told_and_ends_the_run_with_the_earlier_checkpoints_whole(tmp_path, monkeypatch):
    FullDisk(monkeypatch, {4})
    config = quiet_config(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    with pytest.raises(p3.CheckpointError, match=r"checkpoint-4.*No space left.*MiB are free.*continue_on_save_error"):
        p3.train(adapted_model(), chat_dataset(), config)
    assert [p.name for p in tmp_path.iterdir() if "checkpoint" in p.name] == ["checkpoint-2"]
    assert damage(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("full", [{2}, {4}, {6}, {2, 4, 6}])
def test_a_run_goes_on_over_a_full_disk_if_the_user_chose_so(tmp_path, monkeypatch, caplog, full):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 2}
    plain = p3.train(model := adapted_model(), chat_dataset(), quiet_config(tmp_path / "plain", **settings),
                     eval_dataset=chat_dataset(5))  # fmt: skip
    expected = adapters_of(model)
    FullDisk(monkeypatch, full)
    config = quiet_config(tmp_path / "full", **settings, continue_on_save_error=True)
    with caplog.at_level(logging.ERROR, logger="phi3lora"):
        result = p3.train(model := adapted_model(), chat_dataset(), config, eval_dataset=chat_dataset(5))
    assert same_tensors(adapters_of(model), expected) and result.global_step == plain.global_step
    assert {int(r.message.split()[1].rstrip(":")) for r in caplog.records if "No space" in r.message} >= full
    kept = [p for p in (tmp_path / "full").iterdir() if "checkpoint" in p.name]
    assert len(kept) >= (0 if full == {2, 4, 6} else 1)
    assert all(damage(p) is None and int(p.name.split("-")[1]) not in full for p in kept)
    best = result.best_checkpoint  # only one that is there
    assert best is None or Path(best).is_dir()


@pytest.mark.parametrize("limit", [100, 2_000, 20_000])
def test_a_write_that_fails_inside_torch_or_safetensors_is_told_too(tmp_path, limit):
    """A limit on the size of files stands for a full disk: the C++ and Rust writers meet it in the middle."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(p3.Callback):
        def on_step_end(self, state):
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))

    config = quiet_config(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    try:
        with pytest.raises(p3.CheckpointError, match=r"checkpoint-4.*could not be written"):
            p3.train(adapted_model(), chat_dataset(), config, callbacks=[Fill()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir() if "checkpoint" in p.name] == ["checkpoint-2"]
    assert damage(tmp_path / "checkpoint-2") is None


def test_a_crash_while_replacing_a_checkpoint_of_the_same_step_loses_neither(folder, monkeypatch):
    real, good = Path.rename, newest_good_checkpoint(folder)

    def rename(source, target):
        if source.name.endswith(".tmp"):
            raise OSError("disk full")
        return real(source, target)

    monkeypatch.setattr(Path, "rename", rename)
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    config = quiet_config(folder, **steps, resume_from_checkpoint=str(folder / "checkpoint-4"))
    with pytest.raises(p3.CheckpointError, match="disk full"):
        p3.train(adapted_model(lora_dropout=0.1), chat_dataset(), config)
    monkeypatch.undo()
    assert newest_good_checkpoint(folder) == good


def test_what_a_killed_save_leaves_behind_is_not_a_checkpoint(folder):
    shutil.copytree(folder / "checkpoint-6", folder / ".checkpoint-8.123.tmp")
    shutil.copytree(folder / "checkpoint-6", folder / ".checkpoint-8.old")
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]


def test_every_file_is_on_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    events, real_fsync, real_rename = [], os.fsync, Path.rename

    def fsync(descriptor):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        return real_fsync(descriptor)

    def rename(source, target):
        events.append(("rename", target.name))
        return real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    p3.train(adapted_model(), chat_dataset(), quiet_config(tmp_path, max_steps=1, save_strategy="steps"))
    at = events.index(("rename", "checkpoint-1"))
    before = {name for kind, name in events[:at] if kind == "fsync"}
    assert set(FILES) <= before
    assert any(name.startswith(".checkpoint-1") for name in before)  # the folder itself
    assert ("fsync", tmp_path.name) in events[at:]  # and the new name


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), odd=st.booleans())
def test_torch_numpy_and_python_go_on_with_the_same_numbers(tmp_path_factory, seed, odd):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    if odd:  # leaves a second normal number waiting in NumPy and in Python
        np.random.normal()
        random.gauss(0, 1)
    path = tmp_path_factory.mktemp("rng") / "rng.pth"
    torch.save(rng_state(), path)

    def draw():
        return torch.rand(5).tolist(), np.random.normal(size=5).tolist(), [random.gauss(0, 1) for _ in range(5)]

    expected = draw()
    for _ in range(3):
        draw()
    set_rng_state(torch.load(path, weights_only=True))
    assert draw() == expected


def spoilt(value, *path, new):
    """``value`` with something else at ``path``."""
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return value


def moments(shape):
    return {"step": torch.tensor(2.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("optimizer.pt", lambda s: s["state"][0].pop("exp_avg_sq"), "exp_avg_sq"),
        ("optimizer.pt", lambda s: spoilt(s, "state", 0, new=moments((3, 3))), "exp_avg"),
        ("optimizer.pt", lambda s: s["state"][0]["exp_avg"].fill_(float("nan")), "exp_avg"),
        ("optimizer.pt", lambda s: spoilt(s, "param_groups", 0, "maximize", new=torch.ones(3)), "maximize"),
        ("optimizer.pt", lambda s: s["param_groups"].clear(), "0 groups"),
        ("scheduler.pt", lambda s: s.clear(), "scaler"),
        ("rng_state_0.pth", lambda s: spoilt(s, "numpy_rest", 1, new=2**63), "Overflow"),
        ("trainer_state.json", lambda s: spoilt(s, "state", "global_step", new="two"), "global_step is 'two'"),
        ("trainer_state.json", lambda s: spoilt(s, "state", "history", new=[{"step": [], "loss": 1}]), "history"),
        ("trainer_state.json", lambda s: spoilt(s, "state", "best_checkpoint", new="../other"), "best_checkpoint"),
    ],
)
def test_a_whole_checkpoint_of_another_form_is_refused(folder, name, spoil, said):
    """The sums are right: whoever wrote it wrote this."""
    bad = folder / "checkpoint-6"
    is_json = name.endswith(".json")
    value = json.loads((bad / name).read_text()) if is_json else torch.load(bad / name, weights_only=True)
    spoil(value)
    if is_json:
        (bad / name).write_text(json.dumps(value))
    else:
        torch.save(value, bad / name)
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256((bad / name).read_bytes()).hexdigest()
    (bad / "manifest.json").write_text(json.dumps(manifest))
    assert damage(bad) is None
    config = quiet_config(folder, max_steps=8, resume_from_checkpoint=True)
    with pytest.raises(p3.CheckpointError, match=said):
        p3.train(adapted_model(lora_dropout=0.1), chat_dataset(), config)


def test_a_manifest_nested_past_the_recursion_limit_is_damage(folder):
    (folder / "checkpoint-6" / "manifest.json").write_text("[" * 100_000)
    assert "nested too deeply" in damage(folder / "checkpoint-6")
    assert newest_good_checkpoint(folder).name == "checkpoint-4"


@pytest.mark.parametrize("name", ["x" * 5000, "no/such/folder"])
def test_a_checkpoint_that_is_not_there_is_said_to_be_missing(folder, name):
    with pytest.raises(p3.Phi3LoRAError):
        p3.train(adapted_model(), chat_dataset(), quiet_config(folder, max_steps=8, resume_from_checkpoint=name))
