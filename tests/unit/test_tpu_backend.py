from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from distrib_launcher.backends import Request
from distrib_launcher.backends.tpu import clients, launch_words, machines_of, manifest
from distrib_launcher.cli import run
from distrib_launcher.remote import ClientEnd, report, tied

from distrib import RunConfig
from distrib.errors import LaunchError

GKE = {"name": "train", "accelerator": "tpu-v5-lite-podslice", "topology": "4x4", "image": "eu/me/train:1"}


def request(*words: str, kind: str = "script", env: dict[str, str] | None = None, **config: Any) -> Request:
    return Request(kind, words or ("train.py",), RunConfig(**config), env or {})


def fields(document: Any, *path: str | int) -> Any:
    for step in path:
        document = document[step]
    return document


def test_every_setting_of_this_launch_reaches_the_workers() -> None:
    words = launch_words(
        request(
            "pkg.train",
            "--lr",
            "1 2",
            kind="module",
            seed=3,
            mesh={"shard": -1},
            launch={"backend": "tpu", "grace_s": 5.0},
            tpu={"name": "x", "python": "venv/bin/python"},
        )
    )

    assert words == (
        *("venv/bin/python", "-m", "distrib", "launch"),
        *("--set", 'launch.backend="local"', "--set", "seed=3", "--set", "mesh.shard=-1"),
        *("--set", "launch.grace_s=5.0", "--module", "pkg.train", "--lr", "1 2"),
    )


def test_what_a_worker_is_given_is_read_as_the_same_settings(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = request(
        mixed_precision={"param": "bf16"},
        checkpoint={"dir": "3"},
        launch={"preload": ["a", "b"]},
        device="cpu",
    )

    code = run(["launch", *launch_words(asked)[4:-1], "--explain"], {})

    out = capfd.readouterr().out
    assert code == 0
    for key, value in asked.config.set_values().items():
        assert f"  {key} = {value!r}  (--set {key})" in out


def test_over_ssh_each_worker_is_told_its_place() -> None:
    two = clients(request(tpu={"hosts": ["me@10.0.0.1", "10.0.0.2"]}), "/code")

    place = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}
    words = ("python3", "-m", "distrib", "launch", "--set", 'launch.backend="local"', "train.py")
    assert [(one.name, one.prefix) for one in two] == [
        ("worker 0 (me@10.0.0.1)", "[worker 0] "),
        ("worker 1 (10.0.0.2)", "[worker 1] "),
    ]
    assert two[1].words == ("ssh", "-o", "BatchMode=yes", "10.0.0.2", tied(words, place, "/code"))


def test_on_a_worker_the_hosts_are_those_of_its_slice() -> None:
    names = [one.name for one in clients(request(env={"TPU_WORKER_HOSTNAMES": "a,b,c"}), ".")]

    assert names == ["worker 0 (a)", "worker 1 (b)", "worker 2 (c)"]


def test_over_gcloud_each_worker_has_a_client_of_its_own() -> None:
    tpu = {"name": "slice", "zone": "us-central2-b", "project": "mine", "workers": 4}

    four = clients(request(tpu=tpu), "~/code")

    *start, command = four[3].words
    assert shlex.join(start) == (
        "gcloud compute tpus tpu-vm ssh slice --zone=us-central2-b --project=mine --quiet --worker=3"
    )
    words = ("python3", "-m", "distrib", "launch", "--set", 'launch.backend="local"', "train.py")
    assert command == f"--command={tied(words, {}, '~/code')}"


def test_a_dry_run_prints_the_commands_as_a_shell_takes_them(capfd: pytest.CaptureFixture[str]) -> None:
    settings = {"tpu.name": "slice", "tpu.workers": "2", "tpu.folder": "/code"}
    flags = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]

    code = run(["launch", "--backend", "tpu", *flags, "--dry-run", "train.py"], {})

    lines = capfd.readouterr().out.splitlines()
    own = RunConfig(tpu={"name": "slice", "workers": 2})
    expected = clients(Request("script", ("train.py",), own, {}), "/code")
    assert code == 0
    # Only the settings' sources differ between a RunConfig and the command line's, not what is run.
    assert [tuple(shlex.split(line)) for line in lines] == [one.words for one in expected]


def test_a_dry_run_shows_the_question_to_gcloud_when_the_workers_are_not_counted(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = run(["launch", "--backend=tpu", "--set=tpu.name=slice", "--dry-run", "train.py"], {})

    asked, started = capfd.readouterr().out.splitlines()
    assert code == 0
    assert asked == "gcloud compute tpus tpu-vm describe slice --format=json"
    assert "--worker=N" in shlex.split(started)


def test_a_dry_run_prints_no_secret(capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "--set=tpu.name=slice",
        "--set=tpu.workers=4",
        "--dry-run",
        "train.py",
        "--api-key",
        "abcdefgh123",
    ]
    for form in ("text", "gke"):
        gke = [f"--set=tpu.{key}={value}" for key, value in GKE.items() if key != "name"]
        run(["launch", "--backend=tpu", f"--format={form}", *gke, *words], {})

    out, err = capfd.readouterr()
    assert (out.count("<redacted: api-key>"), "abcdefgh123" in out, err) == (5, False, "")


def test_a_slice_of_several_machines_is_a_job_with_a_pod_on_each_and_names_for_them() -> None:
    service, job = yaml.safe_load_all(manifest(request(tpu=GKE, launch={"grace_s": 30.5})))

    assert (service["kind"], fields(service, "metadata", "name")) == ("Service", "train")
    assert service["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"job-name": "train"},
    }
    assert fields(job, "spec", "completions") == fields(job, "spec", "parallelism") == 4
    assert (fields(job, "spec", "completionMode"), fields(job, "spec", "backoffLimit")) == ("Indexed", 0)
    pod = fields(job, "spec", "template", "spec")
    assert (pod["subdomain"], pod["restartPolicy"]) == ("train", "Never")
    assert pod["terminationGracePeriodSeconds"] == 41
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = pod["containers"]
    assert container["image"] == "eu/me/train:1"
    assert container["command"][-1] == "train.py"
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    variables = {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}
    assert variables == {
        "PJRT_DEVICE": "TPU",
        "TPU_WORKER_ID": {
            "fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
        },
        "TPU_WORKER_HOSTNAMES": "train-0.train,train-1.train,train-2.train,train-3.train",
    }


def test_one_machine_needs_no_names() -> None:
    (job,) = yaml.safe_load_all(manifest(request(tpu={**GKE, "topology": "2x4", "folder": "/app"})))

    pod = fields(job, "spec", "template", "spec")
    assert "subdomain" not in pod
    assert pod["containers"][0]["env"] == [{"name": "PJRT_DEVICE", "value": "TPU"}]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 8}
    assert pod["containers"][0]["workingDir"] == "/app"


def test_words_that_look_like_other_yaml_stay_words() -> None:
    (*_, job) = yaml.safe_load_all(manifest(request("train.py", "no", "1e3", "a: b", "#", "it's", tpu=GKE)))

    command = fields(job, "spec", "template", "spec", "containers", 0, "command")
    assert command[-6:] == ["train.py", "no", "1e3", "a: b", "#", "it's"]


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("1x1", (1, 1)),
        ("2x2", (1, 4)),
        ("2x4", (1, 8)),
        ("4x4", (4, 4)),
        ("16x16", (64, 4)),
        ("2x2x1", (1, 4)),
        ("2x2x2", (2, 4)),
        ("4x4x8", (32, 4)),
    ],
)
def test_a_topology_says_how_many_machines_there_are(topology: str, expected: tuple[int, int]) -> None:
    assert machines_of(topology) == expected


@pytest.mark.parametrize(
    ("asked", "code", "named"),
    [
        (request(), "D0916", "where the workers are"),
        (request(tpu={"name": "a", "hosts": ["b"]}), "D0916", "'a'"),
        (request(tpu={"hosts": ["a", "b"], "workers": 3}), "D0921", "tpu.workers is 3, but 2"),
        (request(tpu={"hosts": ["a", "b"]}, launch={"nnodes": 1}), "D0921", "2 workers"),
    ],
)
def test_workers_that_are_not_known_are_no_guess(asked: Request, code: str, named: str) -> None:
    with pytest.raises(LaunchError) as caught:
        clients(asked, ".")

    assert caught.value.code == code
    assert named in caught.value.problem


@pytest.mark.parametrize("key", sorted(GKE))
def test_a_manifest_names_what_it_lacks(key: str) -> None:
    with pytest.raises(LaunchError, match=f"D0919.* tpu.{key} too"):
        manifest(request(tpu={name: value for name, value in GKE.items() if name != key}))


def test_a_topology_that_no_slice_has_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"D0919.*3x3 has 9 chips"):
        machines_of("3x3")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--backend=tpu", "--format=slurm", "--dry-run"], "D0920"),
        (["--format=gke", "--dry-run"], "D0920"),
        (["--backend=tpu", "--format=gke"], "D0308"),
    ],
)
def test_a_form_is_one_of_the_backend_and_only_shown(
    capfd: pytest.CaptureFixture[str], words: list[str], code: str
) -> None:
    assert run(["launch", *words, "train.py"], {}) == 2
    assert f"error[{code}]" in capfd.readouterr().err


def end(name: str, code: int, at: float, *, stopped: bool = False) -> ClientEnd:
    return ClientEnd(name, code, at, stopped)


@pytest.mark.parametrize(
    ("ended", "name", "code"),
    [
        ([end("a", 1, 2.0), end("b", 3, 1.0)], "b", 3),
        ([end("a", 124, 1.0), end("b", 3, 2.0)], "b", 3),  # a lost b, and was quicker
        ([end("a", 124, 1.0), end("b", 3, 2.0, stopped=True)], "b", 3),
        ([end("a", 124, 1.0), end("b", 143, 2.0, stopped=True)], "a", 124),
        ([end("a", 1, 1.0), end("b", 137, 2.0, stopped=True)], "a", 1),
        ([end("a", 137, 1.0), end("b", 143, 2.0, stopped=True)], "a", 137),
    ],
)
def test_the_worker_to_blame_is_the_one_that_failed_of_itself(
    ended: list[ClientEnd], name: str, code: int
) -> None:
    text, found = report(ended, 0)

    assert found == code
    assert text.startswith(f"distrib: {name} failed: exit code {code}\n")


def test_all_went_well_is_no_report() -> None:
    assert report([end("a", 0, 1.0), end("b", 0, 2.0)], 0) == ("", 0)


def test_no_connection_is_said_in_words() -> None:
    assert "no connection" in report([end("a", 255, 1.0)], 0)[0]


def test_an_interrupted_launch_has_the_signals_code() -> None:
    assert report([end("a", 143, 1.0, stopped=True)], signal.SIGINT)[1] == 130
