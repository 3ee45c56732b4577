"""The workers of a TPU slice, each with a launcher of its own: over ssh or gcloud, or as a manifest for GKE.

What is started where is rendered by pure functions (`clients`, `manifest`); `run` shows it or carries it out.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from distrib.config import RunConfig
from distrib.errors import LaunchError
from distrib_launcher.backends import Request, no_such_format
from distrib_launcher.output import say, show
from distrib_launcher.plan import Program
from distrib_launcher.redaction import Redactor
from distrib_launcher.remote import Client, run_together, tied

_FORMATS: Final = ("text", "gke")
_GCLOUD: Final = ("gcloud", "compute", "tpus", "tpu-vm")
_DESCRIBE_LIMIT_S = 120.0
_OPTIONS: Final = {"script": (), "module": ("--module",), "command": ("--no-python",)}
_CHIPS_OF_A_MACHINE = 4  # in slices of several
_ALONE: Final = (1, 4, 8)  # chips of a flat topology that are one machine
_INDEX: Final = "batch.kubernetes.io/job-completion-index"
_EVERY: Final = "N"  # a worker's number in what is shown before gcloud has said how many there are


def run(request: Request) -> int:
    """Start the program on every worker, show its output, end all when one fails; return the exit code.

    Args:
        request: What to start, or to show: "text" is the commands, "gke" a manifest for kubectl.

    Raises:
        LaunchError: if a setting is missing or does not fit (D0916, D0919, D0921), or a client cannot be started
            (D0917, D0918).
    """
    redactor = Redactor(request.env, request.words)
    if request.format not in _FORMATS:
        raise no_such_format(request, "tpu", _FORMATS)
    if not request.words:
        raise LaunchError(
            "D0303",
            "there is no program to launch",
            where="distrib launch",
            fix="name one after the options: distrib launch --backend tpu train.py",
        )
    if request.format == "gke":
        return show(redactor.text(manifest(request)))
    folder = request.config.tpu.folder or str(Path.cwd())
    if request.dry_run:
        commands = [shlex.join(client.words) for client in shown(request, folder)]
        return show(redactor.text("\n".join(commands)))
    config = _counted(request)
    to_start = clients(replace(request, config=config), folder)
    place = f"workers of TPU {config.tpu.name}, through gcloud" if config.tpu.name else "workers, through ssh"
    program = Program(request.kind, request.words[0], request.words[1:])
    say(redactor.text(f"distrib: {program.shown(redactor.words)}: {len(to_start)} {place}"))
    return run_together(to_start, request.env, config.launch.grace_s)


def clients(request: Request, folder: str) -> list[Client]:
    """Return the command for each worker. Pure.

    Args:
        request: With `tpu.hosts`, or `tpu.name` and `tpu.workers`; else TPU_WORKER_HOSTNAMES names the hosts.
        folder: Where the program starts on a worker.

    Raises:
        LaunchError: if it is not known what the workers are (D0916), or the settings contradict that (D0921).
    """
    config, words = request.config, launch_words(request)
    hosts = _hosts(request)
    if hosts:
        _check_count(config, len(hosts))
        names = ",".join(host.rpartition("@")[2] for host in hosts)
        return [
            Client(f"worker {i} ({host})", f"[worker {i}] ", _over_ssh(host, tied(words, variables, folder)))
            for i, host in enumerate(hosts)
            for variables in [
                {"TPU_WORKER_ID": str(i), "TPU_WORKER_HOSTNAMES": names} if len(hosts) > 1 else {}
            ]
        ]
    count = config.tpu.workers or 1
    _check_count(config, count)
    return [
        Client(f"worker {i}", f"[worker {i}] ", _over_gcloud(config, str(i), tied(words, {}, folder)))
        for i in range(count)
    ]


def shown(request: Request, folder: str) -> list[Client]:
    """Return what `clients` does; where gcloud has to say first how many workers there are, the question before it."""
    config = request.config
    if _hosts(request) or config.tpu.workers is not None:
        return clients(request, folder)
    one = _over_gcloud(config, _EVERY, tied(launch_words(request), {}, folder))
    return [Client("gcloud", "", _describe(config)), Client("every worker", "", one)]


def launch_words(request: Request) -> tuple[str, ...]:
    """Return the command with which a worker starts its own ranks: every setting of this launch, wherever it is from."""
    settings = {
        key: value
        for key, value in request.config.set_values().items()
        if key != "launch.backend" and not key.startswith("tpu.")
    }
    given = [
        f"{key}={json.dumps(value, default=BaseModel.model_dump)}"
        for key, value in {"launch.backend": "local", **settings}.items()
    ]
    flags = [word for each in given for word in ("--set", each)]
    return (
        request.config.tpu.python,
        "-m",
        "distrib",
        "launch",
        *flags,
        *_OPTIONS[request.kind],
        *request.words,
    )


def _hosts(request: Request) -> tuple[str, ...]:
    tpu = request.config.tpu
    if tpu.hosts and tpu.name:
        raise LaunchError(
            "D0916",
            f"tpu.hosts is for plain ssh, but tpu.name is {tpu.name!r}, which is for gcloud; expected one of them",
            where=request.config.source("tpu.hosts").where,
            fix="remove one of them",
        )
    if tpu.hosts or tpu.name:
        return tpu.hosts
    found = tuple(host for host in request.env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host)
    if not found:
        raise LaunchError(
            "D0916",
            "it is not known where the workers are: neither tpu.name nor tpu.hosts nor TPU_WORKER_HOSTNAMES is set",
            where="launch.backend",
            fix="set tpu.name (and tpu.zone) for gcloud, or tpu.hosts for plain ssh",
        )
    return found


def _check_count(config: RunConfig, count: int) -> None:
    if config.is_set("launch.nnodes") and count > 1:
        raise LaunchError(
            "D0921",
            f"launch.nnodes is 1, with which each of the {count} workers would train by itself",
            where=config.source("launch.nnodes").where,
            fix="remove it: each worker knows its place from its TPU",
        )
    if config.tpu.workers not in (None, count):
        raise LaunchError(
            "D0921",
            f"tpu.workers is {config.tpu.workers}, but {count} hosts are named",
            where=config.source("tpu.workers").where,
            fix="remove it: the hosts are counted",
        )


def _over_ssh(host: str, command: str) -> tuple[str, ...]:
    return ("ssh", "-o", "BatchMode=yes", host, command)


def _over_gcloud(config: RunConfig, worker: str, command: str) -> tuple[str, ...]:
    name = str(config.tpu.name)
    return (*_GCLOUD, "ssh", name, *_place(config), "--quiet", f"--worker={worker}", f"--command={command}")


def _describe(config: RunConfig) -> tuple[str, ...]:
    return (*_GCLOUD, "describe", str(config.tpu.name), *_place(config), "--format=json")


def _place(config: RunConfig) -> list[str]:
    given = (("zone", config.tpu.zone), ("project", config.tpu.project))
    return [f"--{name}={value}" for name, value in given if value]


def _counted(request: Request) -> RunConfig:
    """Ask gcloud how many workers the TPU has, if nobody has said so."""
    config = request.config
    if _hosts(request) or config.tpu.workers is not None:
        return config
    count = _ask_gcloud(_describe(config), request.env)
    return config.model_copy(update={"tpu": config.tpu.model_copy(update={"workers": count})})


def _ask_gcloud(words: tuple[str, ...], env: Mapping[str, str]) -> int:
    try:
        asked = subprocess.run(
            words,
            check=False,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DESCRIBE_LIMIT_S,
        )
        count = len(json.loads(asked.stdout)["networkEndpoints"]) if asked.returncode == 0 else 0
        why = asked.stderr.strip() or f"exit code {asked.returncode}"
    except FileNotFoundError as error:
        raise LaunchError(
            "D0917",
            f"{words[0]} cannot be started: {error.strerror}",
            where="tpu.name",
            fix="install the gcloud command line, or name the workers in tpu.hosts for plain ssh",
        ) from error
    except subprocess.TimeoutExpired:
        count, why = 0, f"no answer within {_DESCRIBE_LIMIT_S:g} s"
    except (ValueError, KeyError, TypeError) as error:
        count, why = 0, f"its answer is not understood: {type(error).__name__}: {error}"
    if count:
        return count
    raise LaunchError(
        "D0918",
        f"gcloud does not say which workers the TPU has: {why}",
        where="tpu.name",
        fix=f"see what this says: {shlex.join(words)}; or set tpu.workers",
    )


def manifest(request: Request) -> str:
    """Return the YAML of a Job with one pod on each machine of a slice, and of the service that gives them names. Pure.

    Raises:
        LaunchError: if a setting is missing, or no slice has such a topology (D0919).
    """
    import yaml  # noqa: PLC0415 (for this output only)

    config = request.config
    _check_gke(config)
    machines, chips = machines_of(str(config.tpu.topology))
    _check_count(config, machines)
    documents = [_job(request, machines, chips)]
    if machines > 1:
        documents.insert(0, _service(str(config.tpu.name)))
    text: str = yaml.safe_dump_all(documents, sort_keys=False, width=100_000)
    return text.rstrip("\n")


def machines_of(topology: str) -> tuple[int, int]:
    """Return how many machines a slice has, and the chips of each: four, or all of a small flat one.

    Raises:
        LaunchError: if it cannot be divided so (D0919).
    """
    sizes = [int(size) for size in topology.split("x")]
    chips = math.prod(sizes)
    if len(sizes) == 2 and chips in _ALONE:
        return 1, chips
    if chips % _CHIPS_OF_A_MACHINE:
        raise LaunchError(
            "D0919",
            f"tpu.topology {topology} has {chips} chips; expected 1, or a multiple of {_CHIPS_OF_A_MACHINE}",
            where="tpu.topology",
            fix="give that of the node pool: its label cloud.google.com/gke-tpu-topology",
        )
    return chips // _CHIPS_OF_A_MACHINE, _CHIPS_OF_A_MACHINE


def _check_gke(config: RunConfig) -> None:
    values = {name: getattr(config.tpu, name) for name in ("name", "accelerator", "topology", "image")}
    missing = [f"tpu.{name}" for name, value in values.items() if not value]
    if missing:
        raise LaunchError(
            "D0919",
            f"a manifest for GKE needs {', '.join(missing)} too",
            where="--format gke",
            fix="set it, such as tpu: {name: train, accelerator: tpu-v5-lite-podslice, topology: 4x4, image: IMAGE}",
        )


def _service(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        # Without an address of its own, it only gives the pods names; they look each other up before they are ready.
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}},
    }


def _job(request: Request, machines: int, chips: int) -> dict[str, Any]:
    tpu = request.config.tpu
    container = {
        "name": "train",
        "image": tpu.image,
        "command": list(launch_words(request)),
        **({"workingDir": tpu.folder} if tpu.folder else {}),
        "env": [{"name": "PJRT_DEVICE", "value": "TPU"}, *_worker_variables(str(tpu.name), machines)],
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
    }
    pod = {
        **({"subdomain": tpu.name} if machines > 1 else {}),
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(request.config.launch.grace_s) + 10,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": tpu.accelerator,
            "cloud.google.com/gke-tpu-topology": tpu.topology,
        },
        "containers": [container],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": tpu.name},
        "spec": {
            "completionMode": "Indexed",
            "completions": machines,
            "parallelism": machines,
            "backoffLimit": 0,  # one pod alone cannot join the others again
            "template": {"spec": pod},
        },
    }


def _worker_variables(name: str, machines: int) -> list[dict[str, Any]]:
    if machines == 1:
        return []
    hosts = ",".join(f"{name}-{i}.{name}" for i in range(machines))
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{_INDEX}']"}}
    return [
        {"name": "TPU_WORKER_ID", "valueFrom": index},
        {"name": "TPU_WORKER_HOSTNAMES", "value": hosts},
    ]
