"""Checkpoints: whole or absent, verified before use, all tensors, rotated without losing the best."""

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
from conftest import adapted_model, adapters_of, chat_dataset, on, quiet_config, same_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phi3lora as p3
from phi3lora import files
from phi3lora.files import sha256_of
from phi3lora.training import checkpoint as module
from phi3lora.training.checkpoint import (
    checkpoints,
    damage,
    find_checkpoint,
    newest_good_checkpoint,
    rng_state,
    set_rng_state,
)

FILES = [
    "lora.safetensors", "lora_config.json", "manifest.json", "optimizer.pt", "rng_state_0.pth", "scheduler.pt",
    "trainer_state.json",
]  # fmt: skip
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def run(folder, model=None, callbacks=(), eval_dataset=None, **changes):
    """Six steps with checkpoints 2, 4, 6, or the rest of them."""
    config = quiet_config(folder, **{**SAVING, **changes})
    model = model or adapted_model(lora_dropout=0.1)
    return p3.train(model, chat_dataset(), config, eval_dataset=eval_dataset, callbacks=callbacks)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's folder and its adapters."""
    folder, model = tmp_path_factory.mktemp("finished"), adapted_model(lora_dropout=0.1)
    run(folder, model)
    return folder, adapters_of(model)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def folders_in(path):
    return sorted(p.name for p in path.iterdir() if p.is_dir())


# --- Contents


def test_a_checkpoint_has_the_documented_files_and_nothing_is_left_beside_it(finished):
    folder, adapters = finished
    assert folders_in(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for path in checkpoints(folder):
        assert sorted(p.name for p in path.iterdir()) == FILES
        listed = json.loads((path / "manifest.json").read_text())["sha256"]
        hashes = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES}
        assert listed == {name: digest for name, digest in hashes.items() if name != "manifest.json"}
        assert damage(path) is None
    about = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert about["state"]["global_step"] == 4
    assert [line["step"] for line in about["state"]["history"]] == [1, 2, 3, 4]
    assert p3.TrainingConfig(**about["config"]).max_steps == 6
    assert about["versions"]["torch"] == torch.__version__
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        assert torch.load(folder / "checkpoint-6" / name, weights_only=True)
    model = adapted_model(seed=1)
    p3.load_adapter(model, folder / "checkpoint-6" / "lora.safetensors")
    assert same_tensors(adapters_of(model), adapters)


def test_checkpoints_are_ordered_by_step_and_other_names_are_ignored(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-7.bak", "checkpoint-", ".checkpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-500").write_text("a file")
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]
    assert checkpoints(tmp_path / "nowhere") == []


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), odd=st.booleans())
def test_torch_numpy_and_python_continue_with_the_same_random_numbers(tmp_path_factory, seed, odd):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    if odd:  # leaves a second normal number cached in NumPy and in Python
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


# --- Damage


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {"bit flipped": flip_bit, "truncated": truncate, "missing": Path.unlink}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_for_the_newest_good_one(folder, caplog, name, how):
    DAMAGES[how](folder / "checkpoint-6" / name)
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        assert newest_good_checkpoint(folder) == folder / "checkpoint-4"
    (warning,) = caplog.messages
    assert "checkpoint-6" in warning
    assert name in warning or (name, how) == ("manifest.json", "bit flipped")  # the bit may be in any file's line


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_noticed(folder, data):
    path = folder / "checkpoint-6" / data.draw(st.sampled_from([n for n in FILES if n != "manifest.json"]))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    assert damage(folder / "checkpoint-6") == f"{path.name} has changed since it was written"
    path.write_bytes(content)


def test_a_manifest_that_lists_nothing_does_not_make_a_checkpoint_whole(folder):
    (folder / "checkpoint-6" / "manifest.json").write_text('{"format": 1, "sha256": {}}')
    assert newest_good_checkpoint(folder) == folder / "checkpoint-4"


def test_a_checkpoint_of_another_format_is_passed_over_and_a_run_s_folder_leads_to_its_checkpoints(folder):
    path = folder / "checkpoint-6" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    assert "format 2, of another version; allowed: 1" in damage(folder / "checkpoint-6")
    assert newest_good_checkpoint(folder) == folder / "checkpoint-4"
    with pytest.raises(p3.CheckpointError, match=r"it holds checkpoints, allowed: one of '.*checkpoint-6'"):
        find_checkpoint(quiet_config(folder, resume_from_checkpoint=str(folder)))


def test_without_a_good_checkpoint_resuming_is_an_error_and_auto_starts_from_scratch(folder):
    for path in checkpoints(folder):
        (path / "manifest.json").unlink()
    assert newest_good_checkpoint(folder) is None
    assert find_checkpoint(quiet_config(folder, resume_from_checkpoint="auto")) is None
    with pytest.raises(p3.CheckpointError, match="no good checkpoint"):
        find_checkpoint(quiet_config(folder, resume_from_checkpoint=True))
    with pytest.raises(p3.CheckpointError, match=r"cannot resume from .*checkpoint-6.*manifest"):
        find_checkpoint(quiet_config(folder, resume_from_checkpoint=str(folder / "checkpoint-6")))
    with pytest.raises(p3.CheckpointError, match=r"cannot resume from .*nowhere.*no such folder"):
        find_checkpoint(quiet_config(folder, resume_from_checkpoint="nowhere"))


def test_training_resumes_from_the_newest_good_one_and_overwrites_the_damaged(folder, finished):
    flip_bit(folder / "checkpoint-6" / "optimizer.pt")
    model, steps = adapted_model(seed=1, lora_dropout=0.1), []

    run(folder, model, [on(lambda state: steps.append(state.global_step))], resume_from_checkpoint=True)
    assert steps == [5, 6]
    assert same_tensors(adapters_of(model), finished[1])
    assert damage(folder / "checkpoint-6") is None


class Pickled:
    """Loading it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def moments_of_another_shape(witness):
    state = {"step": torch.tensor(2.0), "exp_avg": torch.zeros(3, 3), "exp_avg_sq": torch.zeros(3, 3)}
    return {"param_groups": [], "state": {0: state}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[(name, Pickled) for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth")],
        ("optimizer.pt", moments_of_another_shape),
    ],
)
def test_a_forged_checkpoint_executes_nothing_and_is_refused(folder, name, content):
    """Its manifest fits: whoever wrote the manifest wrote this."""
    bad, witness, model = folder / "checkpoint-6", folder / "executed", adapted_model(lora_dropout=0.1)
    before = adapters_of(model)
    torch.save(content(witness), bad / name)
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256((bad / name).read_bytes()).hexdigest()
    (bad / "manifest.json").write_text(json.dumps(manifest))
    assert damage(bad) is None
    with pytest.raises(p3.CheckpointError, match="cannot read"):
        run(folder, model, max_steps=8, resume_from_checkpoint=True)
    assert not witness.exists()
    assert same_tensors(adapters_of(model), before)


# --- Writes that fail


@pytest.mark.parametrize("function", ["rename", "json", "fsync"])
def test_a_failed_save_leaves_the_earlier_checkpoints_whole_and_no_half_one(tmp_path, monkeypatch, function):
    def fail(real, hits):
        def call(*args, **kwargs):
            if hits(*args):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call

    at = "checkpoint-4"
    if function == "rename":
        monkeypatch.setattr(Path, "rename", fail(Path.rename, lambda source, *_: at in source.name))
    elif function == "json":
        monkeypatch.setattr(module, "_write_json", fail(module._write_json, lambda path, *_: at in path.parent.name))
    else:
        monkeypatch.setattr(files, "fsync", fail(files.fsync, lambda path: at in path.parent.name))
    with pytest.raises(p3.CheckpointError, match=r"checkpoint-4.*No space left.*MiB are free.*continue_on_save_error"):
        run(tmp_path)
    assert folders_in(tmp_path) == ["checkpoint-2"]
    assert damage(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_write_that_fails_inside_torch_or_safetensors_is_reported_too(tmp_path, limit):
    """A limit on the size of files stands for a full disk: the C++ and Rust writers run into it."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    fill = on(lambda state: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1])), 3)
    try:
        with pytest.raises(p3.CheckpointError, match=r"checkpoint-4.*could not be written") as caught:
            run(tmp_path, callbacks=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "continue_on_save_error=True continues without it" in str(caught.value)
    assert ("took only a part" in str(caught.value)) == ("unexpected pos" in str(caught.value))
    assert folders_in(tmp_path) == ["checkpoint-2"]
    assert damage(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("full_at", [{2}, {6}, {2, 4, 6}])
def test_a_run_continues_over_a_full_disk_if_the_user_chose_so(tmp_path, monkeypatch, caplog, full_at):
    changes = {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": chat_dataset(5)}
    run(tmp_path / "plain", expected := adapted_model(), **changes)
    real = module._write_files

    def write(parts, state, folder):
        real(parts, state, folder)
        if state.global_step in full_at:
            (folder / "optimizer.pt").write_bytes(b"")  # half written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_write_files", write)
    with caplog.at_level(logging.ERROR, logger="phi3lora"):
        result = run(tmp_path / "full", found := adapted_model(), continue_on_save_error=True, **changes)
    assert same_tensors(adapters_of(found), adapters_of(expected)) and result.global_step == 6
    reported = {int(r.message.split()[1].rstrip(":")) for r in caplog.records if "No space" in r.message}
    assert reported >= full_at
    assert all("; the run continues without it" in r.message for r in caplog.records if "No space" in r.message)
    kept = checkpoints(tmp_path / "full")
    assert len(kept) >= (0 if full_at == {2, 4, 6} else 1)
    assert all(damage(p) is None and int(p.name.split("-")[1]) not in full_at for p in kept)
    best = result.best_checkpoint  # names only one that exists
    assert best is None or Path(best).is_dir()


def test_a_crash_while_replacing_a_checkpoint_of_the_same_step_loses_neither(folder, monkeypatch):
    real, old = Path.rename, sha256_of(folder / "checkpoint-6" / "optimizer.pt")

    def rename(source, target):
        if source.name.endswith(".tmp"):
            raise OSError("disk full")
        return real(source, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(p3.CheckpointError, match="disk full"):
        run(folder, resume_from_checkpoint=str(folder / "checkpoint-4"))
    monkeypatch.undo()
    assert newest_good_checkpoint(folder) == folder / "checkpoint-4"
    assert damage(folder / "checkpoint-6.set-aside") is None
    assert sha256_of(folder / "checkpoint-6.set-aside" / "optimizer.pt") == old


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
    run(tmp_path, max_steps=1)
    at = events.index(("rename", "checkpoint-1"))
    before = {name for kind, name in events[:at] if kind == "fsync"}
    assert set(FILES) <= before
    assert any(name.startswith(".checkpoint-1") for name in before)  # the folder itself
    assert ("fsync", tmp_path.name) in events[at:]  # and the new name
