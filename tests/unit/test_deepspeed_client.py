from __future__ import annotations

import pytest
import torch
from torch import nn

from distrib.errors import ConfigError
from distrib.strategies.deepspeed_client import check_optimizer, check_sections, resolved_optimizer
from distrib.strategies.deepspeed_config import UserFile


def adamw(**changes):
    return torch.optim.AdamW(nn.Linear(1, 1).parameters(), **{"lr": 3e-4, "betas": (0.9, 0.95), **changes})


def user(kind="AdamW", **params):
    return UserFile("ds.json", {"optimizer": {"type": kind, "params": params}})


def error_of(function, *args):
    with pytest.raises(ConfigError) as caught:
        function(*args)
    assert caught.value.where.startswith("ds.json (")
    assert caught.value.fix
    return str(caught.value)


AUTOS = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")


@pytest.mark.parametrize("found", [
    user(**AUTOS),
    user("AdamW", lr=3e-4, betas=[0.9, 0.95], weight_decay="auto"),
    user("adamw", torch_adam=True),
    user("Adam", lr=0.0003),  # whose weight decay DeepSpeed decouples
    user("auto"),
])  # fmt: skip
def test_a_file_that_says_the_same_as_the_script_or_auto_is_taken(found):
    check_sections(found)
    check_optimizer(found, adamw())


def test_auto_takes_the_scripts_values():
    found = resolved_optimizer(user(**AUTOS, torch_adam=True), adamw(lr=torch.tensor(0.5)))
    params = {"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-2}
    assert found == {"optimizer": {"type": "AdamW", "params": params}}
    assert resolved_optimizer(UserFile(), adamw()) == {}


def test_any_optimizer_of_torch_may_be_named():
    sgd = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1, momentum=0.9)
    check_sections(user("SGD", lr=0.1))
    check_optimizer(user("SGD", lr=0.1, momentum=0.9), sgd)
    assert "the script prepares a AdamW" in error_of(check_optimizer, user("SGD"), adamw())


@pytest.mark.parametrize(("found", "code", "words"), [
    (user(lr=1e-3), "D0884", "optimizer.params.lr"),
    (user(lr=1e-3), "D0884", "AdamW in the script has 0.0003"),
    (user(betas=[0.9, 0.999]), "D0884", "(0.9, 0.95)"),
    (user("Lion"), "D0884", "the script prepares a AdamW"),
    (user("Adam", adam_w_mode=False), "D0884", "the script prepares a AdamW"),
    (user(wieght_decay=0.1), "D0882", "weight_decay"),
])  # fmt: skip
def test_what_differs_from_the_scripts_optimizer_is_told_with_both_values(found, code, words):
    check_sections(found)
    text = error_of(check_optimizer, found, adamw())
    assert code in text
    assert words in text


@pytest.mark.parametrize(("tree", "code", "words"), [
    ({"optimizer": "AdamW"}, "D0883", "optimizer"),
    ({"optimizer": {"type": "AdamWw"}}, "D0883", "AdamW"),
    ({"optimizer": {"params": {}}}, "D0883", "optimizer.type"),
    ({"optimizer": {"type": "AdamW", "parms": {}}}, "D0882", "optimizer.params"),
    ({"optimizer": {"type": "AdamW", "params": [1]}}, "D0883", "optimizer.params"),
    ({"scheduler": {"type": "WarmUpLR"}}, "D0883", "WarmupLR"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 500}}}, "D0884", "warmup_num_steps"),
])  # fmt: skip
def test_sections_that_deepspeed_would_not_understand_or_nobody_would_follow_are_refused(tree, code, words):
    text = error_of(check_sections, UserFile("ds.json", tree))
    assert code in text
    assert words in text


def test_a_schedule_whose_values_are_all_auto_is_taken():
    params = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
    check_sections(UserFile("ds.json", {"scheduler": {"type": "WarmupLR", "params": params}}))
