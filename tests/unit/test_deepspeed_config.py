"""A user's own DeepSpeed file: what is wrong with it is told with the key's path, before any rank trains."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distrib.config import RunConfig, from_wire, load_config, to_wire
from distrib.errors import ConfigError, StrategyError
from distrib.precision.policy import PrecisionPolicy
from distrib.strategies.deepspeed_config import (
    Seen,
    Settings,
    UserFile,
    check,
    engine_config,
    read_user_file,
    refuse_precision,
    stage_of,
    unused_scaling,
)
from distrib.strategies.deepspeed_errors import Origin, told

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="pip install deepspeed==0.19.8: the keys are those of its models"
)
BF16 = PrecisionPolicy("bf16", compute=torch.bfloat16, output=torch.float32)


def settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "stage": 2,
        "stage_is_set": False,
        "offload": {"offload_optimizer": "none", "offload_param": "none"},
        "nvme_path": None,
        "device_type": "cpu",
        "global_batch_size": None,
        "accumulation": None,
        "precision": PrecisionPolicy(),
        "world_size": 2,
        "readers": 2,
    }
    return Settings(**{**values, **changes})


MISTAKES: list[tuple[Any, dict[str, Any], str, str]] = [
    # file, settings, code, words of the message
    ({"zero_optimisation": {"stage": 2}}, {}, "D0882", "did you mean 'zero_optimization'"),
    ({"zero_optimization": {"stge": 2}}, {}, "D0882", "did you mean 'zero_optimization.stage'"),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
        {},
        "D0882",
        "did you mean 'zero_optimization.offload_param.device'",
    ),
    ({"aio": {"queue_dept": 8}}, {}, "D0882", "did you mean 'aio.queue_depth'"),
    ({"flops_profiler": {"enable": True}}, {}, "D0882", "did you mean 'flops_profiler.enabled'"),
    ({"zero_optimization": {"stage": 4}}, {}, "D0883", "zero_optimization.stage"),
    ({"zero_optimization": True}, {}, "D0883", "expected an object"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, {}, "D0883", "reduce_bucket_size"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
        {},
        "D0883",
        "zero_optimization.offload_optimizer.device",
    ),
    ({"train_batch_size": "sixteen"}, {}, "D0883", "a whole number of at least 1"),
    ({"train_micro_batch_size_per_gpu": 0}, {}, "D0883", "a whole number of at least 1"),
    ({"wall_clock_breakdown": "yes"}, {}, "D0883", "true or false"),
    ({"communication_data_type": "float"}, {}, "D0883", "fp32, bf16, fp16"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, {}, "D0884", "bf16.enabled is true too"),
    ({"fp16": {"enabled": True}}, {}, "D0884", "mixed_precision is no"),
    ({"bf16": {"enabled": False}}, {"precision": BF16}, "D0884", "mixed_precision is bf16"),
    (
        {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
        {},
        "D0884",
        "4 x 2 x 2 = 16",
    ),
    ({"train_batch_size": 32}, {"global_batch_size": 16}, "D0884", "global_batch_size is 16"),
    ({"gradient_accumulation_steps": 4}, {}, "D0884", "gradient_accumulation_steps is not set"),
    (
        {"gradient_accumulation_steps": 4},
        {"accumulation": 2},
        "D0884",
        "gradient_accumulation_steps is 2",
    ),
    ({"gradient_clipping": 1.0}, {}, "D0884", "clip_grad_norm_"),
    ({"zero_optimization": {"stage": 3}}, {"stage": 1, "stage_is_set": True}, "D0884", "deepspeed.zero_stage is 1"),
    ({"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}}, {}, "D0885", "allgather_bucket_size"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}}, {}, "D0885", "offload_param.device"),
    ({"torch_autocast": {"enabled": True}}, {}, "D0886", "mixed_precision"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, {}, "D0886", "offload_optimizer"),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        {},
        "D0941",
        "deepspeed.nvme_path",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/a"}}},
        {},
        "D0887",
        "stage 3",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/a"}}},
        {"nvme_path": "/b"},
        "D0884",
        "deepspeed.nvme_path is /b",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}},
        {},
        "D0886",
        "offload_optimizer.ratio",
    ),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}, {"world_size": 6}, "D0943", "is 4"),
    ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}, {}, "D0887", "stage 3"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, {}, "D0942", "cuda only"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, {}, "D0942", "cuda only"),
    (
        {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
        {},
        "D0886",
        "frozen weights",
    ),
    ({"sequence_parallel_size": 2}, {}, "D0886", "mesh.context"),
    ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, {}, "D0887", "at least 1"),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, {}, "D0887", "stage 3"),
    ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, {}, "D0887", "the stage is 1"),
]  # fmt: skip


@needs_deepspeed
@pytest.mark.parametrize(
    ("tree", "ours", "code", "words"),
    MISTAKES,
    ids=[f"{code} {list(tree)[-1]} {i}" for i, (tree, _, code, _) in enumerate(MISTAKES)],
)
def test_a_mistake_in_the_file_is_told_with_its_place(tree, ours, code, words):
    with pytest.raises(ConfigError) as caught:
        check(UserFile("ds.json", tree), settings(**ours))
    assert caught.value.code == code
    assert caught.value.where.startswith("ds.json (")
    assert words in str(caught.value)
    assert caught.value.fix


def test_an_offload_of_our_own_that_the_stage_does_not_have_is_refused():
    offload = {"offload_optimizer": "none", "offload_param": "cpu"}
    with pytest.raises(ConfigError, match=r"D0887.*deepspeed.offload_param"):
        check(UserFile(), settings(offload=offload))


def test_a_folder_for_nvme_that_nothing_uses_is_refused():
    with pytest.raises(ConfigError, match=r"D0887.*deepspeed.nvme_path"):
        check(UserFile(), settings(nvme_path="/a"))


@needs_deepspeed
def test_what_zero_plus_plus_has_is_taken_where_it_can_run():
    zero = {
        "stage": 3,
        "zero_hpz_partition_size": 2,
        "zero_quantized_weights": True,
        "zero_quantized_gradients": True,
    }
    check(UserFile("ds.json", {"zero_optimization": zero}), settings(device_type="cuda", world_size=4))
    off = {"stage": 2, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}
    check(UserFile("ds.json", {"zero_optimization": off}), settings())


def test_offload_to_nvme_gets_the_folder_and_buffers_of_the_model_s_size():
    offload = {"offload_optimizer": "nvme", "offload_param": "nvme"}
    ours = settings(stage=3, offload=offload, nvme_path="/a")
    check(UserFile(), ours)
    zero = engine_config(UserFile(), ours, Seen(100, None, largest=33), None)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "nvme_path": "/a"}
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": "/a", "buffer_size": 17}


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (None, "D0880", "No such file"),
        (b"\xff\xfe", "D0880", "UTF-8"),
        (b'{"a": 1,}', "D0881", "not JSON"),
        (b"[1]", "D0881", "expected an object"),
        (b'{"zero_optimization": {"stage": 1, "stage": 2}}', "D0881", "stands twice"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, text, code, words):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_user_file(str(path))
    assert caught.value.code == code


@needs_deepspeed
def test_what_would_stand_in_a_file_may_stand_in_the_run_s_own_settings(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(
        "strategy: deepspeed\ndeepspeed:\n  config:\n    zero_optimization: {stage: 3, reduce_bucket_size: 5e8, stge: 1}\n"
    )
    from_file = from_wire(to_wire(load_config(tmp_path / "run.yaml", env={}))).deepspeed.config
    from_code = RunConfig(
        deepspeed={"config": {"zero_optimization": {"stage": 3, "stge": 1}}}
    ).deepspeed.config
    for tree in (from_file, from_code):
        with pytest.raises(ConfigError, match=r"D0882.*deepspeed.config \(zero_optimization.stge\)"):
            check(read_user_file(tree), settings())
        assert stage_of(read_user_file(tree), settings()) == 3


@needs_deepspeed
def test_a_usual_file_is_taken_with_every_auto_resolved(tmp_path: Path):
    (tmp_path / "ds.json").write_text(
        json.dumps(
            {
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "bf16": {"enabled": "auto"},
                "fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2},
                "wall_clock_breakdown": False,
                "zero_optimization": {
                    "stage": 3,
                    "overlap_comm": True,
                    "contiguous_gradients": True,
                    "reduce_bucket_size": "auto",
                    "stage3_prefetch_bucket_size": "auto",
                    "stage3_param_persistence_threshold": "auto",
                    "stage3_max_live_parameters": 1e9,
                    "stage3_gather_16bit_weights_on_model_save": True,
                },
            }
        )
    )
    user, ours = read_user_file(tmp_path / "ds.json"), settings(precision=BF16)
    check(user, ours)
    assert stage_of(user, ours) == 3
    assert unused_scaling(user) == ["fp16.loss_scale", "fp16.hysteresis"]
    found = engine_config(user, ours, Seen(1000, 64), torch.bfloat16)
    zero = found["zero_optimization"]
    assert "auto" not in json.dumps(found)
    assert zero["reduce_bucket_size"] == 64 * 64
    assert zero["stage3_prefetch_bucket_size"] == 3686
    assert zero["stage3_param_persistence_threshold"] == 640
    assert zero["stage3_max_live_parameters"] == 1e9
    assert (found["bf16"]["enabled"], "fp16" in found) == (True, False)
    assert (found["gradient_accumulation_steps"], found["gradient_clipping"]) == (1, 0.0)


@needs_deepspeed
def test_an_auto_of_the_hidden_size_needs_a_model_that_says_it():
    user = UserFile("ds.json", {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}})
    check(user, settings())
    with pytest.raises(ConfigError, match=r"D0885.*zero_optimization.reduce_bucket_size"):
        engine_config(user, settings(), Seen.of(nn.Linear(2, 2)), None)


@needs_deepspeed
def test_sizes_that_say_the_same_as_the_run_are_taken():
    tree = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    check(UserFile("ds.json", tree), settings(accumulation=2))
    check(UserFile("ds.json", tree), settings(global_batch_size=16))
    check(
        UserFile("ds.json", tree), settings(accumulation=2, world_size=4)
    )  # two share each sample: mesh.context


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_without_a_file_an_engine_decides_nothing_that_is_decided_here(stage):
    found = engine_config(UserFile(), settings(stage=stage), Seen(10, None), None)
    assert found["zero_optimization"]["stage"] == stage
    assert (found["gradient_accumulation_steps"], found["gradient_clipping"]) == (1, 0.0)
    assert not {"optimizer", "scheduler", "fp16", "bf16"} & set(found)


@pytest.mark.parametrize(
    "policy",
    [
        PrecisionPolicy("fp8", compute=torch.bfloat16, fp8=True),
        PrecisionPolicy("bf16", compute=torch.bfloat16, fp32_modules=("*.norm",)),
        PrecisionPolicy("bf16", compute=torch.bfloat16, param=torch.bfloat16),
    ],
)
def test_formats_that_zero_does_not_have_are_refused(policy):
    with pytest.raises(StrategyError, match="D0879"):
        refuse_precision(policy, 2)


def raised_in(filename: str, statement: str) -> None:
    exec(compile(statement, filename, "exec"), {})


DEEPSPEED = find_spec("deepspeed")
DEEPSPEED_ENGINE = f"{Path(str(DEEPSPEED and DEEPSPEED.origin)).parent}/runtime/engine.py"
LOST = "raise RuntimeError('[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer')"


@needs_deepspeed
@pytest.mark.parametrize(
    ("statement", "where"),
    [
        ("raise AssertionError('More elements 630000 than buffer size 10')",
         "DeepSpeed's zero_optimization.offload_param.buffer_size"),
        ("raise ValueError('reduce_bucket_size 7 is too small')", "ds.json (zero_optimization.reduce_bucket_size)"),
        ("raise TypeError('no such device at this stage')", None),
        ("raise type('ZeroError', (Exception,), {'__module__': 'deepspeed.runtime.zero'})('its own class')", None),
    ],
)  # fmt: skip
def test_an_error_of_deepspeed_s_own_code_names_the_key_it_speaks_of(statement, where):
    user = UserFile("ds.json", {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}})
    with pytest.raises(StrategyError, match="D0945") as caught, told("a step", Origin(user.tree, user)):
        raised_in(DEEPSPEED_ENGINE, statement)
    assert caught.value.where == where
    assert "engine.py:1" in str(caught.value)
    assert caught.value.__cause__ is not None


@needs_deepspeed
def test_an_error_of_several_engines_names_the_one_whose_file_has_the_key():
    user = UserFile("critic.json", {"zero_optimization": {"reduce_bucket_size": 7}})
    engines = [Origin({"zero_optimization": {"reduce_bucket_size": 9}}, UserFile()), Origin(user.tree, user)]
    with pytest.raises(StrategyError) as caught, told("a backward", *engines):
        raised_in(DEEPSPEED_ENGINE, "raise ValueError('reduce_bucket_size is too small')")
    assert caught.value.where == "critic.json (zero_optimization.reduce_bucket_size)"


@pytest.mark.parametrize(
    ("filename", "statement", "expected"),
    [
        ("/lib/site-packages/torch/distributed/c10d.py", "raise RuntimeError('peer is gone')", RuntimeError),
        ("/home/me/train.py", "raise ValueError('mine')", ValueError),
        ("/home/me/deepspeed/train.py", "raise ValueError('mine')", ValueError),
        (DEEPSPEED_ENGINE, LOST, RuntimeError),
        (DEEPSPEED_ENGINE, "import torch; raise torch.OutOfMemoryError('full')", torch.OutOfMemoryError),
        (DEEPSPEED_ENGINE, "raise KeyboardInterrupt", KeyboardInterrupt),
    ],
)
def test_errors_that_are_not_deepspeed_s_stay_as_they_are(filename, statement, expected):
    with pytest.raises(expected), told("a step", Origin({}, UserFile())):
        raised_in(filename, statement)
