"""The public names are those of the design: each is there, or says that it is not built yet."""

from __future__ import annotations

import importlib
import inspect
import pickle
from collections.abc import Iterator

import pytest

import distrib
from distrib import Accelerator, DistribError, NotBuiltError

PUBLIC = {
    "Accelerator": "distrib.accelerator",
    "CheckpointError": "distrib.errors",
    "CollectiveError": "distrib.errors",
    "ConfigError": "distrib.errors",
    "DataError": "distrib.errors",
    "DistribError": "distrib.errors",
    "LaunchError": "distrib.errors",
    "NotBuiltError": "distrib.errors",
    "RunConfig": "distrib.config",
    "StrategyError": "distrib.errors",
    "TopologyError": "distrib.errors",
    "TrainingError": "distrib.errors",
    "get_logger": "distrib.logging",
    "LocalSGD": "distrib.local_sgd",
    "init_empty": "distrib.strategies.meta",
    "launch": "distrib_launcher.functions",
    "notebook_launcher": "distrib_launcher.functions",
    "set_seed": "distrib.seeding",
    "testing": "distrib.testing",
    "tracking": "distrib.tracking",
}
DESIGNED = ("init_empty", "find_executable_batch_size", "LocalSGD", "compat")

PROPERTIES = (
    "device", "config", "topology", "mesh", "num_processes", "process_index", "local_process_index",
    "is_main_process", "is_local_main_process", "is_last_process", "mixed_precision", "scaler", "sync_gradients",
    "optimizer_step_was_skipped", "should_stop", "batch_size", "sample_mask", "trackers", "project_dir",
)  # fmt: skip
METHODS = {  # name -> its parameters; * before those that are keywords only
    "prepare": "*objects",
    "prepare_model": "model * evaluation_mode",
    "prepare_optimizer": "optimizer",
    "prepare_scheduler": "scheduler",
    "prepare_data_loader": "data_loader * is_distributed",
    "accumulate": "*models",
    "no_sync": "model",
    "autocast": "",
    "backward": "loss * count **kwargs",
    "clip_grad_norm_": "parameters max_norm norm_type",
    "clip_grad_value_": "parameters clip_value",
    "gather": "x",
    "gather_for_metrics": "x use_gather_object * loader",
    "reduce": "x reduction scale",
    "broadcast": "x from_process",
    "gather_object": "x",
    "broadcast_object": "x from_process",
    "pad_across_processes": "x dim pad_index pad_first",
    "save_state": "output_dir * blocking durable metrics allow_pickle",
    "load_state": "input_dir * strict ignore verify allow_pickle",
    "save_model": "model save_directory max_shard_size * dtype include adapter tokenizer",
    "get_state_dict": "model",
    "unwrap_model": "model keep_fp32_wrapper keep_torch_compile",
    "gathered": "*models",
    "register_for_checkpointing": "*objects",
    "register_save_state_pre_hook": "hook",
    "register_load_state_pre_hook": "hook",
    "skip_first_batches": "loader num_batches",
    "check_in_sync": "*models",
    "join_uneven_inputs": "models even_batches",
    "free_memory": "*objects",
    "wait_for_everyone": "",
    "main_process_first": "",
    "local_main_process_first": "",
    "on_main_process": "function",
    "on_local_main_process": "function",
    "on_last_process": "function",
    "on_process": "function process_index",
    "split_between_processes": "x apply_padding",
    "print": "*args **kwargs",
    "set_trigger": "",
    "check_trigger": "",
    "progress": "iterable",
    "profile": "options",
    "init_trackers": "project_name config init_kwargs",
    "log": "values step",
    "get_tracker": "name unwrap",
    "end_training": "",
}
OWN = (
    "gradient_accumulation_steps",
    "pipeline_step",
    "pipeline_forward",
)  # built beside the design's list, as Accelerate has it

HIERARCHY = {
    "ConfigError": "DistribError",
    "NotBuiltError": "ConfigError",
    "TopologyError": "DistribError",
    "LaunchError": "DistribError",
    "CollectiveError": "DistribError",
    "DataError": "DistribError",
    "TrainingError": "DistribError",
    "CheckpointError": "DistribError",
    "StrategyError": "DistribError",
}


@pytest.fixture(scope="module")
def accelerator() -> Iterator[Accelerator]:
    accelerator = Accelerator(cpu=True)
    yield accelerator
    accelerator.end_training()


def is_built(name: str) -> bool:
    return inspect.getattr_static(Accelerator, name, None) is not None


def parameters_of(function: object) -> str:
    words, keywords_begun = [], False
    for parameter in list(inspect.signature(function).parameters.values())[1:]:  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords_begun:
            keywords_begun = True
            words.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        words.append(stars + parameter.name)
    return " ".join(words)


def test_all_lists_exactly_the_public_names():
    assert sorted(distrib.__all__) == sorted(PUBLIC)


def test_dir_lists_the_public_names():
    assert dir(distrib) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_what_its_module_defines(name: str):
    home = importlib.import_module(PUBLIC[name])
    value = getattr(distrib, name)
    assert value is (home if name in distrib._MODULES else getattr(home, name))


def test_a_star_import_brings_the_public_names():
    names: dict[str, object] = {}
    exec("from distrib import *", names)
    assert set(PUBLIC) <= set(names)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'distrib' has no attribute 'Acelerator'"):
        _ = distrib.Acelerator
    assert not hasattr(distrib, "__wrapped__")


@pytest.mark.parametrize("name", [name for name in DESIGNED if name not in distrib.__all__])
def test_a_name_of_the_design_that_is_not_built_says_so(name: str):
    with pytest.raises(NotBuiltError, match=rf"distrib\.{name} is not built yet"):
        getattr(distrib, name)


@pytest.mark.parametrize("name", [name for name in DESIGNED if name not in distrib.__all__])
def test_importing_a_name_that_is_not_built_says_so(name: str):
    with pytest.raises(NotBuiltError, match=rf"distrib\.{name} is not built yet"):
        exec(f"from distrib import {name}")


@pytest.mark.parametrize(("name", "parent"), HIERARCHY.items())
def test_the_errors_form_the_documented_tree(name: str, parent: str):
    assert getattr(distrib, name).__bases__ == (getattr(distrib, parent),)
    assert f"-- {name} " in str(importlib.import_module("distrib.errors").__doc__)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.endswith("Error")])
def test_an_error_survives_pickling_with_its_code_place_and_fix(name: str):
    cls = getattr(distrib, name)
    error = (
        cls("a feature", where="here")
        if cls is NotBuiltError
        else cls("D0199", "it is odd", where="here", fix="mend")
    )
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, DistribError)
    assert (type(copy), str(copy), copy.code, copy.where) == (cls, str(error), error.code, "here")


@pytest.mark.parametrize("name", [*PROPERTIES, *METHODS])
def test_an_accelerator_has_the_name_or_says_that_it_is_not_built(accelerator: Accelerator, name: str):
    if not is_built(name):
        with pytest.raises(NotBuiltError, match=rf"Accelerator\.{name} is not built yet"):
            getattr(accelerator, name)


@pytest.mark.parametrize("name", [name for name in PROPERTIES if is_built(name)])
def test_a_property_is_a_property(name: str):
    assert isinstance(inspect.getattr_static(Accelerator, name), property)


@pytest.mark.parametrize("name", [name for name in METHODS if is_built(name)])
def test_a_method_has_the_parameters_of_the_design(name: str):
    assert parameters_of(getattr(Accelerator, name)) == METHODS[name]


def test_the_constructor_has_the_parameters_of_the_design():
    assert parameters_of(Accelerator.__init__) == (
        "config * strategy mixed_precision gradient_accumulation_steps global_batch_size project_dir log_with seed cpu"
    )


def test_an_accelerator_has_no_public_name_that_is_not_listed_here():
    names = {name for name in vars(Accelerator) if not name.startswith("_")}
    assert names <= {*PROPERTIES, *METHODS, *OWN}


def test_an_unknown_name_of_an_accelerator_is_an_attribute_error(accelerator: Accelerator):
    with pytest.raises(AttributeError, match="no attribute 'gahter'"):
        _ = accelerator.gahter


@pytest.mark.parametrize("name", [name for name in [*PROPERTIES, *METHODS] if is_built(name)])
def test_a_built_name_has_a_docstring(name: str):
    assert inspect.getdoc(inspect.getattr_static(Accelerator, name))
