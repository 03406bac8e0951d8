"""The files for clusters: they parse, and what they start trains with two processes, here on the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import free_port

import phi3lora as p3

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"
SHORT = ["max_steps=2", "per_device_train_batch_size=2", "--max-length", str(p3.demo.MAX_LENGTH), "--dtype", "float32"]


@pytest.fixture
def environment(tmp_path):
    """The variables that the files read, for the demo's model and data; and the package's commands in PATH."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "torchrun").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    (programs / "torchrun").chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MODEL": str(p3.demo.BASE),
        "DATA": str(p3.demo.FOLDER / "train.jsonl"),
        "OUTPUT_DIR": str(tmp_path / "run"),
        "PORT": str(free_port()),
        "GPUS": "2",
    }


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def must_have_trained(processes: list[subprocess.Popen[str]], environment: dict[str, str]) -> str:
    texts = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(texts)
    folder = Path(environment["OUTPUT_DIR"])
    assert (folder / "adapter.safetensors").is_file()
    assert (folder / "checkpoint-2" / "rng_state_1.pth").is_file()  # of two processes
    return "\n".join(texts)


def job_of(path: Path) -> tuple[dict, dict]:
    service, job = yaml.safe_load_all(path.read_text())
    return service, job


@pytest.mark.parametrize("name", ["nodes.sh", "slurm.sh"])
def test_a_script_is_valid_bash(name):
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n", str(FOLDER / name)]).returncode == 0


def test_the_pods_of_the_kubernetes_job_find_each_other():
    service, job = job_of(FOLDER / "kubernetes.yaml")
    assert service["spec"]["clusterIP"] == "None"
    name, spec = job["metadata"]["name"], job["spec"]
    assert service["spec"]["selector"] == {"job-name": name}
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert values["HEAD"] == f"{name}-0.{pod['subdomain']}" and pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(values["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(values["GPUS"])
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert all(values[name].startswith(mounted["shared"]) for name in ("DATA", "OUTPUT_DIR"))


@pytest.mark.slow
def test_two_nodes_train_together(environment):
    environment |= {"NODES": "2", "GPUS": "1", "HEAD": "localhost"}
    command = ["bash", str(FOLDER / "nodes.sh"), *SHORT]
    text = must_have_trained([start(command, environment), start(command, environment)], environment)
    assert "2 processes" in text


@pytest.mark.slow
def test_the_slurm_script_trains(environment, tmp_path):
    srun = tmp_path / "programs" / "srun"
    srun.write_text('#!/bin/sh\nshift\nexec "$@"\n')  # one task on this machine
    srun.chmod(0o755)
    environment |= {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": environment["PORT"]}
    must_have_trained([start(["bash", str(FOLDER / "slurm.sh"), *SHORT], environment)], environment)


def test_the_slurm_script_stops_its_steps_before_the_time_limit_and_queues_itself_again(tmp_path, environment):
    """Slurm's own commands are replaced by ones that note their arguments; the step ends as an interrupted run does."""
    programs, said = tmp_path / "programs", tmp_path / "said"
    for name, script in {
        "srun": 'kill -USR1 "$PPID"; while [ ! -e "$SAID" ]; do sleep 0.05; done; exit 143',
        "scancel": 'echo "scancel $*" >> "$SAID"',
        "scontrol": 'echo "scontrol $*" >> "$SAID"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    environment |= {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7", "SAID": str(said)}
    process = start(["bash", str(FOLDER / "slurm.sh")], environment)
    process.communicate(timeout=300)
    assert process.returncode == 143
    assert said.read_text().splitlines() == ["scancel --signal=TERM 7", "scontrol requeue 7"]


@pytest.mark.slow
def test_the_kubernetes_command_trains(environment):
    _, job = job_of(FOLDER / "kubernetes.yaml")
    [container] = job["spec"]["template"]["spec"]["containers"]
    command = [part.replace(":29500", f":{environment['PORT']}") for part in container["command"]]
    environment |= {"NODES": "1", "HEAD": "localhost", "JOB_COMPLETION_INDEX": "0"}
    must_have_trained([start([*command, *SHORT], environment)], environment)
