from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from distrib_launcher.cli import run
from distrib_launcher.commands.options import flags
from distrib_launcher.planning import choose_start_method, most_processes

import distrib
from distrib import RunConfig
from distrib.config import with_code


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("raise SystemExit('it was started')")
    return tmp_path


def shown(capfd: pytest.CaptureFixture[str], *words: str, **env: str) -> str:
    code = run(["launch", *words], env)
    out, err = capfd.readouterr()
    assert code == 0, err
    return out


def refused(capfd: pytest.CaptureFixture[str], *words: str, **env: str) -> str:
    code = run(["launch", *words, "train.py"], env)
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    return err


def test_a_dry_run_shows_the_command_the_environment_and_each_value_s_source(
    capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "distrib.yaml").write_text("seed: 3\n")
    out = shown(capfd, "-n", "2", "--dry-run", "train.py", "--lr", "1 2", DISTRIB_DATA__TAIL="pad")

    assert "command: python train.py --lr '1 2'" in out
    assert out.count("MASTER_PORT='<a free port>'") == 2
    assert "  RANK=1" in out
    assert "config: distrib.yaml" in out
    for line in (
        "launch.nproc_per_node = 2  (--nproc-per-node)",
        "seed = 3  (distrib.yaml:1)",
        "(DISTRIB_DATA__TAIL)",
    ):
        assert line in out


def test_every_rank_gets_the_same_configuration(capfd: pytest.CaptureFixture[str]) -> None:
    out = shown(capfd, "-n", "2", "--seed", "7", "--dry-run", "train.py")
    wires = [
        line.partition("DISTRIB_CONFIG=")[2].strip("'")
        for line in out.splitlines()
        if "DISTRIB_CONFIG" in line
    ]

    assert wires[0] == wires[1]
    assert ["seed", 7, "flag", "--seed"] in json.loads(wires[0])["settings"]


def test_a_flag_overrides_the_file_and_the_plan_says_so(
    capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "run.yaml").write_text("seed: 3\n")

    assert "seed = 4 (--seed) overrides 3 (run.yaml:1)" in shown(
        capfd, "-c", "run.yaml", "--seed", "4", "--dry-run", "train.py"
    )


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (["--cpu"], "device = 'cpu'"),
        (["--device", "cpu"], "device = 'cpu'"),
        (["--num_processes", "2"], "launch.nproc_per_node = 2"),
        (["--nproc_per_node=2"], "launch.nproc_per_node = 2"),
        (["-n2"], "launch.nproc_per_node = 2"),
        (["--mixed_precision", "no"], "mixed_precision = 'no'"),
        (["--mixed-precision", "bf16"], "mixed_precision = 'bf16'"),
        (["--multi_gpu"], "strategy = 'ddp'"),
        (["--grace", "2.5"], "launch.grace_s = 2.5"),
        (["--collective-timeout", "60"], "watch.stall_timeout_s = 60"),
        (["--set", "data.tail=pad"], "data.tail = 'pad'"),
        (["--set", "checkpoint.keep_last=2"], "checkpoint.keep_last = 2"),
        (["--gradient-accumulation-steps", "4"], "gradient_accumulation_steps = 4"),
    ],
)
def test_a_flag_sets_its_key(capfd: pytest.CaptureFixture[str], words: list[str], setting: str) -> None:
    assert setting in shown(capfd, *words, "--explain")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--nproc-per-nod", "2"], ["D0306", "--nproc-per-nod", "did you mean '--nproc-per-node'"]),
        (["-n", "0"], ["D0106", "--nproc-per-node", "got 0"]),
        (["-n", "two"], ["D0106", "--nproc-per-node", "'two'"]),
        (["-n", "-1"], ["D0106", "--nproc-per-node", "got -1"]),
        (["--grace", "-1"], ["D0106", "--grace", "got -1"]),
        (["--seed=-1"], ["D0106", "--seed", "got -1"]),
        (["-n", "5000"], ["D0106", "--nproc-per-node", "got 5000", "at most"]),
        (["-n", "99999999999999999999", "--dry-run"], ["D0106", "--nproc-per-node", "at most"]),
        (["--mixed-precision", "--cpu"], ["D0106", "--mixed-precision", "'--cpu'"]),
        (["-n", "2", "-n", "3"], ["D0308", "--nproc-per-node is given as '2' and as '3'"]),
        (["--set", "seed=1", "--set", "seed=2"], ["D0308", "--set seed is given as '1' and as '2'"]),
        (["-c", "a.yaml", "--config", "b.yaml"], ["D0308", "--config is given as 'a.yaml' and as 'b.yaml'"]),
        (["-m", "--no-python"], ["D0308", "--module", "--no-python"]),
        (["-n", "2", "--num-processes", "3"], ["D0308", "--nproc-per-node", "--num-processes"]),
        (["-c", ""], ["D0102", "--config", "is empty"]),
        (["-n", "2", "--set", "mesh.replicate=3"], ["D0112", "--set mesh.replicate", "the world size is 2"]),
        (["--seed", "0x" + "f" * 6000], ["D0106", "--seed", "got '0xfff"]),
        (["-n", "0o" + "7" * 6000], ["D0106", "--nproc-per-node", "got '0o777"]),
        (["--set", "seed"], ["D0309", "seed", "KEY=VALUE"]),
        (["--set", "sed=3"], ["D0105", "--set sed", "seed"]),
        (["--strategy", "single", "-n", "2"], ["D0310", "--strategy", "2"]),
        (["--nnodes", "2"], ["D0901", "--nnodes"]),
        (["--backend", "slurm"], ["D0901", "--backend"]),
        (["--max-restarts", "-1"], ["D0106", "--max-restarts", "got -1"]),
        (["--start-method", "forkserver"], ["D0106", "--start-method", "fork or spawn"]),
        (["--preload", "my-module"], ["D0106", "--preload", "the name of a module"]),
        (["--show-ranks", "first"], ["D0106", "--show-ranks", "the number of a rank"]),
        (["-n", "2", "--show-ranks", "0,2"], ["D0314", "--show-ranks", "there is no rank 2 among 2"]),
        (["--hostfile", "no-such-hosts"], ["D0946", "--hostfile", "no-such-hosts"]),
        (["--rdzv_backend", "etcd"], ["D0901", "--rdzv-backend"]),
        (["--machine_rank", "1"], ["D0901", "--machine-rank"]),
        (["--master_addr", "10.0.0.1"], ["D0901", "--master-addr"]),
        (["--main_process_ip", "node1"], ["D0901", "--main-process-ip"]),
        (["--node-rank", "1"], ["D0901", "--node-rank 1"]),
        (["--rdzv-endpoint", "node1:29400"], ["D0901", "--rdzv-endpoint"]),
        (["--rdzv-id", "7"], ["D0901", "--rdzv-id"]),
        (["--rdzv-conf", "timeout=3"], ["D0901", "--rdzv-conf"]),
        (["--num_machines", "2"], ["D0901", "launch.nnodes"]),
        (["-c", "none.yaml"], ["D0102", "none.yaml"]),
        (["--master-port", "99999"], ["D0106", "--master-port", "99999"]),
    ],
)
def test_a_wrong_option_is_refused_and_nothing_is_started(
    capfd: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    err = refused(capfd, *words)

    assert err.startswith("error[")
    assert "fix:" in err
    assert [part for part in parts if part not in err] == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["tran.py"], ["D0304", "tran.py", "did you mean 'train.py'"]),
        (["-m", "no_such_module.main"], ["D0304", "no_such_module"]),
        (["--no-python", "no-such-command"], ["D0304", "no-such-command"]),
        (["."], ["D0304", "__main__.py"]),
        ([], ["D0303", "no program"]),
    ],
)
def test_a_missing_program_is_found_before_anything_is_started(
    capfd: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    code = run(["launch", *words], {"PATH": "/usr/bin:/bin"})

    err = capfd.readouterr().err
    assert code == 2
    assert [part for part in parts if part not in err] == []


def test_the_program_s_arguments_are_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    out = shown(capfd, "--dry-run", "train.py", "-n", "3", "--", "--set", "x", "--help")

    assert "command: python train.py -n 3 -- --set x --help" in out
    assert "processes: 1" in out


def test_a_module_s_arguments_are_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert "command: python -m json.tool -m --no-python" in shown(
        capfd, "-m", "--dry-run", "json.tool", "-m", "--no-python"
    )


def test_a_user_s_thread_count_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    assert "threads: 3 (OMP_NUM_THREADS=3)" in shown(capfd, "--dry-run", "train.py", OMP_NUM_THREADS="3")


def test_a_thread_count_that_is_no_number_exits_with_the_environment_s_code(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(["launch", "train.py"], {"OMP_NUM_THREADS": "many"}) == 3
    assert "D0202" in capfd.readouterr().err


def test_an_unknown_command_is_named_with_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["lunch"], {}) == 2
    assert "did you mean 'launch'" in capfd.readouterr().err


def test_the_same_value_twice_is_no_contradiction(capfd: pytest.CaptureFixture[str]) -> None:
    assert flags([("seed", "1", "--seed")], ["seed=1"]) == {"seed": ("1", "--seed")}
    assert "seed = 1  (--seed)" in shown(capfd, "--seed", "1", "--seed", "1", "--cpu", "--cpu", "--explain")


def test_a_script_with_quite_another_name_is_not_suggested(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["launch", "nope.py"], {}) == 2
    assert "did you mean" not in capfd.readouterr().err


def test_a_dry_run_shows_the_values_too_in_whichever_order_it_is_asked_for(
    capfd: pytest.CaptureFixture[str],
) -> None:
    orders = [("--dry-run", "--explain"), ("--explain", "--dry-run"), ("--dry-run",)]
    seen = {shown(capfd, "--seed", "1", *order, "train.py") for order in orders}

    assert len(seen) == 1
    assert "seed = 1  (--seed)" in seen.pop()


def test_what_torchrun_and_accelerate_say_of_one_machine_is_understood(
    capfd: pytest.CaptureFixture[str],
) -> None:
    torchrun = ["--standalone", "--nnodes=1", "--nproc_per_node=2", "--node_rank=0", "--rdzv-backend=c10d"]
    accelerate = ["--num_processes", "2", "--num_machines", "1", "--machine_rank", "0"]
    accelerate += ["--main_process_ip", "127.0.0.1", "--main_process_port", "0", "--mixed_precision", "no"]

    for words in ([*torchrun, "--rdzv-endpoint=localhost:0"], accelerate):
        assert "processes: 2" in shown(capfd, *words, "--dry-run", "train.py")


@pytest.mark.parametrize(
    "sizes", [["mesh.replicate=2"], ["mesh.shard=2"], ["mesh.replicate=1", "mesh.context=2"]]
)
def test_an_axis_without_a_size_takes_the_ranks_that_are_left(
    capfd: pytest.CaptureFixture[str], sizes: list[str]
) -> None:
    words = [word for size in sizes for word in ("--set", size)]

    assert "processes: 4" in shown(capfd, "-n", "4", "--strategy", "fsdp", *words, "--dry-run", "train.py")


def test_accelerates_flag_for_deepspeed_is_understood(capfd: pytest.CaptureFixture[str]) -> None:
    lines = shown(capfd, "--use_deepspeed", "--explain").splitlines()

    assert "  strategy = 'deepspeed'  (--use-deepspeed)" in lines


def test_the_explanation_has_every_value_with_its_source(capfd: pytest.CaptureFixture[str]) -> None:
    lines = shown(capfd, "--seed", "4", "--explain", DISTRIB_LAUNCH__GRACE_S="3").splitlines()

    assert "  seed = 4  (--seed)" in lines
    assert "  launch.grace_s = 3.0  (DISTRIB_LAUNCH__GRACE_S)" in lines
    assert "  data.tail = 'exact'  (default)" in lines
    assert not any("checkpoint.on_signal" in line for line in lines)  # nobody can set it yet


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-n", "2"], "fork (torch is loaded once for all)"),
        (["-n", "1"], "spawn (one process)"),
        (["-n", "2", "--start-method", "spawn"], "spawn (--start-method)"),
        (["-n", "1", "--start-method", "fork"], "fork (--start-method)"),
        (["-n", "2", "--no-python"], "spawn (a command)"),
    ],
)
def test_the_plan_says_how_the_ranks_are_started_and_why(
    capfd: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    program = "true" if "--no-python" in words else "train.py"
    assert f"start method: {told}" in shown(capfd, *words, "--dry-run", program, PATH=os.environ["PATH"])


def test_forking_is_for_linux_only() -> None:
    method, why = choose_start_method(RunConfig(), "script", 2, "darwin")

    assert (method, "darwin" in why) == ("spawn", True)


@pytest.mark.parametrize(
    ("given", "kind", "count", "expected"),
    [
        ({}, "script", 1, ("spawn", "one process")),
        ({}, "module", 2, ("fork", "torch is loaded once for all")),
        ({}, "function", 2, ("fork", "torch is loaded once for all")),
        ({}, "command", 2, ("spawn", "a command")),
        ({"launch.start_method": "fork"}, "script", 1, ("fork", "run.py:3")),
        ({"launch.start_method": "spawn"}, "script", 2, ("spawn", "run.py:3")),
        ({"launch.start_method": "fork"}, "command", 2, ("spawn", "a command")),
    ],
)
def test_the_start_method_is_the_user_s_where_it_can_be_and_else_the_faster_one(
    given: dict[str, object], kind: str, count: int, expected: tuple[str, str]
) -> None:
    config = with_code(RunConfig(), given, "run.py:3")

    assert choose_start_method(config, kind, count, "linux") == expected
    assert choose_start_method(config, kind, count, "darwin")[0] == "spawn"


@pytest.mark.parametrize(
    "words",
    [
        ["--node-rank", "0"],
        ["--master-addr", "127.0.0.1"],
        ["--main-process-ip", "localhost"],
        ["--rdzv-backend", "static"],
        ["--rdzv-endpoint", "127.0.0.1"],
        ["--rdzv-endpoint", "localhost:0"],
        ["--standalone"],
    ],
)
def test_an_option_of_several_machines_that_means_this_one_is_understood(
    capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert shown(capfd, *words, "--dry-run", "train.py") == shown(capfd, "--dry-run", "train.py")


def test_secrets_are_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    secret = "Xq93hfUq81nQwz55"
    out = shown(
        capfd, "--dry-run", "train.py", "--api-key", secret, f"--url=http://me:{secret}@host", HF_TOKEN=secret
    )

    assert secret not in out
    assert "--api-key '<redacted: api-key>'" in out


def test_no_command_shows_the_help_and_is_a_wrong_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([], {}) == 2

    out, err = capfd.readouterr()
    assert (out, err.splitlines()[0]) == ("", "Usage: distrib [OPTIONS] COMMAND [ARGS]...")
    assert "launch" in err


def test_the_version_is_the_package_s(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], {}) == 0
    assert capfd.readouterr().out == f"distrib {distrib.__version__}\n"


def test_no_limit_of_open_files_allows_more_processes_than_any_machine_needs() -> None:
    assert most_processes(10**9) == 4096


def test_a_mesh_of_a_file_that_needs_more_processes_is_refused(
    capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "run.yaml").write_text("seed: 0\nmesh: {replicate: 3}\n")

    err = refused(capfd, "-n", "2", "-c", "run.yaml")

    assert err.startswith("error[D0112] run.yaml:2 (mesh.replicate): ")
    assert "mesh.replicate = 3  (run.yaml:2)" in shown(capfd, "-n", "3", "-c", "run.yaml", "--explain")
