"""A user's own DeepSpeed file: what is wrong with it is told with the key's path, before any rank trains."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

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

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="pip install deepspeed==0.19.8: the keys are those of its models"
)
BF16 = PrecisionPolicy("bf16", compute=torch.bfloat16, output=torch.float32)


def settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "stage": 2,
        "stage_is_set": False,
        "offload": {"offload_optimizer": "none", "offload_param": "none"},
        "global_batch_size": None,
        "accumulation": None,
        "precision": PrecisionPolicy(),
        "world_size": 2,
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
    ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, {}, "D0886", "torch.optim.AdamW"),
    ({"scheduler": {"type": "WarmupLR"}}, {}, "D0886", "lr_scheduler"),
    ({"torch_autocast": {"enabled": True}}, {}, "D0886", "mixed_precision"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, {}, "D0886", "offload_optimizer"),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
        {},
        "D0886",
        "nvme",
    ),
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
