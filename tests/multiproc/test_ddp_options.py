"""DDP's options: whatever is set, and whichever parameters a rank uses, the run is that of one process."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distrib import Accelerator, RunConfig, StrategyError
from distrib.strategies import batchnorm
from distrib.testing import RanksFailed, run_ranks
from tests.contract.by_hand import counted

EVERYTHING = [["ab"] * 4] * 2
NEVER_B = [["a"] * 4] * 2
DIFFERENT = [["a"] * 4, ["b"] * 4]
CHANGING = [["ab"] * 4, ["a", "b", "ab", "b"], ["ab", "a", "b", "ab"]]


def started(*, sync_batchnorm=False, accumulation=None, folder=".", **ddp) -> Accelerator:
    config = RunConfig(
        strategy="ddp",
        device="cpu",
        ddp=ddp,
        project_dir=folder,
        seed=3,
        gradient_accumulation_steps=accumulation,
        sync_batchnorm=sync_batchnorm,
    )
    return Accelerator(config)


class TwoHeads(nn.Module):
    """A body and two heads, of which each call names those that it uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.a, self.b = (nn.Linear(3, size).double() for size in (3, 1, 1))

    def forward(self, x, heads):
        hidden = torch.tanh(self.body(x))
        return sum(getattr(self, name)(hidden) for name in heads)


def inputs(rank, steps):
    draw = torch.Generator().manual_seed(rank)
    return [torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(steps)]


def parameters_of(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_equal(found, expected, rtol=1e-12):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-14, msg=name)


def with_heads(plan, accumulation=None, **ddp):
    """Train on `plan[rank][micro-step]`; return parameters, whether DDP looks, what is left in `.grad`, what was said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        accelerator = started(accumulation=accumulation, **ddp)
        heads = plan[accelerator.process_index]
        model = TwoHeads()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        before = id(model)
        for x, names in zip(inputs(accelerator.process_index, len(heads)), heads, strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(model(x, names).square().mean())
                optimizer.step()
                without = [name for name, p in model.module.named_parameters() if p.grad is None]
                optimizer.zero_grad()
        assert type(model) is DistributedDataParallel
        assert id(model) == before
    return parameters_of(model.module), model.find_unused_parameters, without, said.getvalue()


def with_heads_in_one_process(plan, accumulation=1):
    model = TwoHeads()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    streams = [inputs(rank, len(heads)) for rank, heads in enumerate(plan)]
    for start in range(0, len(plan[0]), accumulation):
        for step in range(start, start + accumulation):
            losses = [
                model(xs[step], heads[step]).square().mean() for xs, heads in zip(streams, plan, strict=True)
            ]
            (sum(losses) / len(plan) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model)


# Parameters that are not used


def with_heads_both_ways(plan, accumulation=None):
    return [with_heads(plan, accumulation, find_unused_parameters=looks) for looks in ("auto", True)]


@pytest.mark.parametrize(
    "plan", [EVERYTHING, NEVER_B, DIFFERENT, CHANGING], ids=["everything", "never b", "different", "changing"]
)
def test_whatever_the_ranks_use_the_run_is_that_of_one_process(plan):
    expected = with_heads_in_one_process(plan)
    for runs in run_ranks(with_heads_both_ways, len(plan), plan):
        for found, *_ in runs:
            assert_equal(found, expected)


def test_what_a_window_used_in_any_micro_step_counts_as_used():
    plan = [["b", "a", "a", "a"], ["a", "a", "a", "b"]]
    expected = with_heads_in_one_process(plan, 2)
    for runs in run_ranks(with_heads_both_ways, 2, plan, 2):
        for found, *_ in runs:
            assert_equal(found, expected)


def test_auto_stops_looking_and_says_nothing_if_the_first_step_used_everything():
    for _, looks, _, said in run_ranks(with_heads, 2, EVERYTHING):
        assert not looks
        assert "unused" not in said


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (NEVER_B, "no rank used b.weight, b.bias, of 6 parameters"),
        (DIFFERENT, "only some ranks used a.weight, a.bias, b.weight, b.bias, of 6 parameters"),
    ],
)
def test_auto_goes_on_looking_and_says_once_for_what(plan, words):
    (_, looks, _, said), (_, looks_too, _, said_elsewhere) = run_ranks(with_heads, 2, plan)
    assert looks
    assert looks_too
    assert said.count("ddp.find_unused_parameters auto: ") == 1
    assert words in said
    assert "find_unused_parameters" not in said_elsewhere


def test_a_parameter_that_no_rank_used_has_no_gradient():
    for runs in run_ranks(with_heads_both_ways, 2, NEVER_B):
        assert [without for _, _, without, _ in runs] == [["b.weight", "b.bias"]] * 2


def file_descriptor_2_in_a_run(plan):
    """Return all that a run with the defaults writes to stderr, by C++ too, after its start."""
    accelerator = started()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            model = accelerator.prepare(TwoHeads())
            for x, heads in zip(inputs(0, 4), plan[accelerator.process_index], strict=True):
                accelerator.backward(model(x, heads).square().mean())
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
        file.seek(0)
        return file.read().decode()


def test_a_run_that_uses_everything_is_silent():
    assert run_ranks(file_descriptor_2_in_a_run, 2, EVERYTHING) == ["", ""]


def test_torch_prints_nothing_when_auto_goes_on_looking():
    main, other = run_ranks(file_descriptor_2_in_a_run, 2, NEVER_B)
    assert len(main.splitlines()) == 1
    assert other == ""


def refused(heads, own_step=True, **ddp):
    """Use `heads` step by step; return the error, the number of steps, and whether a last step changed anything."""
    accelerator = started(**ddp)
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = (
        (accelerator.prepare(model), optimizer) if not own_step else accelerator.prepare(model, optimizer)
    )
    for step, (x, names) in enumerate(zip(inputs(0, len(heads)), heads, strict=True)):
        before = parameters_of(model.module)
        try:
            accelerator.backward(model(x, names).square().mean())
            optimizer.step()
        except StrategyError as error:
            after = parameters_of(model.module)
            return str(error), step, any(not torch.equal(after[name], before[name]) for name in before)
    return None


@pytest.mark.parametrize(
    ("heads", "ddp", "step", "fix"),
    [
        (["a"], {"find_unused_parameters": False}, 0, "set ddp.find_unused_parameters: auto"),
        (["ab", "ab", "a"], {"find_unused_parameters": "auto"}, 2, "set ddp.find_unused_parameters: true"),
        (["ab", "ab", "a"], {"static_graph": True}, 2, "set ddp.static_graph: false"),
    ],
)
def test_an_unused_parameter_is_named_before_the_step_is_taken(heads, ddp, step, fix):
    for text, when, changed in run_ranks(refused, 2, heads, **ddp):
        assert text.startswith("error[D0806]")
        assert "gave no gradient to b.bias, b.weight on this rank" in text
        assert f"fix: {fix}" in text
        assert (when, changed) == (step, False)


def test_a_loop_whose_steps_are_not_ours_is_told_at_the_next_forward():
    for text, when, _ in run_ranks(refused, 2, ["a", "ab"], own_step=False, find_unused_parameters=False):
        assert text.startswith("error[D0806]")
        assert "b.bias, b.weight" in text
        assert when == 1


def test_the_rank_that_lacks_a_gradient_is_the_root_cause():
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 of 2 failed.*D0806.*b\.bias, b\.weight on this rank"):
        run_ranks(with_heads, 2, [["ab"] * 4, ["a"] * 4], find_unused_parameters=False)


class OutputOf:
    """What torch cannot look into."""

    def __init__(self, value):
        self.value = value


class Hiding(TwoHeads):
    def forward(self, x, heads):
        return OutputOf(super().forward(x, heads))


def hidden_output():
    accelerator = started()
    model = accelerator.prepare(Hiding())
    accelerator.backward(model(inputs(0, 1)[0], "a").value.sum())
    with pytest.raises(StrategyError) as caught:
        model(inputs(0, 1)[0], "a")
    return str(caught.value)


def test_an_output_that_hides_its_tensors_is_told_so():
    for text in run_ranks(hidden_output, 2):
        assert "b.bias, b.weight" in text
        assert "let forward return its tensors in lists, tuples or dicts" in text


class Checkpointed(TwoHeads):
    def forward(self, x, heads):
        hidden = torch.tanh(self.body(x))
        return sum(checkpoint(getattr(self, name), hidden, use_reentrant=True) for name in heads)


def checkpointed(heads, **ddp):
    accelerator = started(**ddp)
    model = Checkpointed()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    for x in inputs(accelerator.process_index, 4):
        accelerator.backward(model(x, heads).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model.module)


@pytest.mark.parametrize(
    ("plan", "ddp"),
    [(EVERYTHING, {}), (EVERYTHING, {"static_graph": True}), (NEVER_B, {"static_graph": True})],
)
def test_reentrant_checkpoints_work_under_the_default_or_with_a_static_graph(plan, ddp):
    for found in run_ranks(checkpointed, 2, plan[0][0], **ddp):
        assert_equal(found, with_heads_in_one_process(plan))


def test_reentrant_checkpoints_beside_unused_parameters_name_the_way_out():
    with pytest.raises(
        RanksFailed, match=r"(?s)D0811.*a\.\w+ came when .*for checkpoints set ddp\.static_graph: true"
    ):
        run_ranks(checkpointed, 2, "a")


def compiled(when, plan):
    accelerator = started()
    rank = accelerator.process_index
    model = TwoHeads()
    given = torch.compile(model, backend="aot_eager") if when == "before" else model
    given, optimizer = accelerator.prepare(given, torch.optim.AdamW(model.parameters(), lr=0.1))
    called = torch.compile(given, backend="aot_eager") if when == "after" else given
    for x, heads in zip(inputs(rank, 4), plan[rank], strict=True):
        accelerator.backward(called(x, heads).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model), given.find_unused_parameters


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("plan", [EVERYTHING, NEVER_B], ids=["everything", "never b"])
def test_auto_finds_out_about_compiled_models(when, plan):
    for found, looks in run_ranks(compiled, 2, when, plan):
        assert_equal(found, with_heads_in_one_process(plan))
        assert looks == (plan is NEVER_B)


def with_a_hook_of_the_user(plan):
    """Return how often a hook that the user registered was called in each step."""
    accelerator = started()
    model = accelerator.prepare(TwoHeads())
    calls = []

    def hook(state, bucket):
        calls[-1] += 1
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, hook)
    for x, heads in zip(inputs(0, 3), plan[accelerator.process_index], strict=False):
        calls.append(0)
        accelerator.backward(model(x, heads).square().mean())
    return calls


def test_a_hook_that_the_user_registered_stays_when_auto_goes_on_looking():
    for calls in run_ranks(with_a_hook_of_the_user, 2, NEVER_B):
        assert min(calls) > 0


def two_losses(heads, world_size=1, **ddp):
    """Both forwards come before both backward calls."""
    accelerator = started(**ddp)
    model = TwoHeads()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        ranks = [accelerator.process_index] if accelerator.num_processes > 1 else range(world_size)
        first, second = (
            sum(model(inputs(rank, 3)[step], names).square().mean() for rank in ranks) for names in heads
        )
        for loss in (first, second):
            accelerator.backward(loss if accelerator.num_processes > 1 else loss / world_size)
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(accelerator.unwrap_model(model))


@pytest.mark.parametrize(
    ("heads", "ddp"),
    [
        (("ab", "ab"), {"find_unused_parameters": False}),
        (("ab", "ab"), {"find_unused_parameters": "auto"}),
        (("ab", "ab"), {"static_graph": True}),
        (("a", "a"), {"find_unused_parameters": "auto"}),
        (("ab", "ab"), {"find_unused_parameters": True}),
    ],
)
def test_a_second_loss_of_a_micro_step_is_averaged_too(heads, ddp):
    expected = run_ranks(two_losses, 1, heads, 2)[0]
    for found in run_ranks(two_losses, 2, heads, **ddp):
        assert_equal(found, expected)


def calls_a_method_of_the_inner_model(heads, accumulation=None, **ddp):
    """The wrapper's own forward is never called."""
    accelerator = started(accumulation=accumulation, **ddp)
    model = TwoHeads()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inner = accelerator.unwrap_model(model)
    for step in range(4):
        with accelerator.accumulate(model):
            loss = inner.forward(inputs(accelerator.process_index, 4)[step], heads).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.check_in_sync()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("looks", ["auto", True, False])
def test_the_first_loss_of_a_method_of_the_inner_model_is_averaged_too(looks, accumulation):
    run_ranks(calls_a_method_of_the_inner_model, 2, "ab", accumulation, find_unused_parameters=looks)


def test_an_unused_parameter_behind_a_method_of_the_inner_model_is_named():
    with pytest.raises(RanksFailed, match=r"(?s)D0806.*b\.weight.*call the prepared model"):
        run_ranks(calls_a_method_of_the_inner_model, 2, "a")


def test_forwards_of_different_parameters_before_one_backward_are_refused():
    with pytest.raises(
        RanksFailed, match=r"(?s)D0811.*[ab]\.\w+ came when .*fix: call backward after each forward"
    ):
        run_ranks(two_losses, 2, ("a", "b"), find_unused_parameters=True)


# A static graph


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_static_graph_gives_the_run_of_one_process(accumulation):
    plan = [["a"] * 6] * 2
    expected = with_heads_in_one_process(plan, accumulation)
    for found, *_ in run_ranks(with_heads, 2, plan, accumulation, static_graph=True):
        assert_equal(found, expected)


def test_a_static_graph_does_not_look_for_unused_parameters_besides():
    with pytest.raises(RanksFailed, match=r"(?s)D0807.*fix: remove ddp\.find_unused_parameters"):
        run_ranks(with_heads, 2, NEVER_B, static_graph=True, find_unused_parameters=True)


# Buckets


def bucketed(ways: list[dict]) -> list[tuple[int, bool, dict]]:
    """Return for each way the exchanges of the third step, whether `.grad` is a view of a bucket, and the parameters."""
    found = []
    for ddp in ways:
        accelerator = started(accumulation=2, **ddp)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(400, 400, bias=False) for _ in range(4))).double()  # 1.3 MB each
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        draw = torch.Generator().manual_seed(accelerator.process_index)
        views = []

        def step(accelerator=accelerator, model=model, optimizer=optimizer, draw=draw, views=views):
            for _ in range(2):
                with accelerator.accumulate(model):
                    x = torch.randn(2, 400, generator=draw, dtype=torch.float64)
                    accelerator.backward(model(x).square().mean())
                    views.append(next(model.parameters()).grad._is_view())
                    optimizer.step()
                    optimizer.zero_grad()

        step()
        step()
        found.append((counted(step), views[-1], parameters_of(model.module)))
    return found


def test_buckets_change_how_often_ranks_talk_and_not_the_numbers():
    ways = [{}, {"bucket_cap_mb": 1}, {"bucket_cap_mb": 100, "gradient_as_bucket_view": True}]
    for default, small, large in run_ranks(bucketed, 2, ways):
        assert [x[0] for x in (default, small, large)] == [2, 4, 1]  # the first of torch's own has 1 MiB
        assert [x[1] for x in (default, small, large)] == [False, False, True]
        assert_equal(small[2], default[2])
        assert_equal(large[2], default[2])


@pytest.mark.parametrize("plan", [NEVER_B, DIFFERENT], ids=["never b", "different"])
def test_gradients_that_are_views_of_buckets_give_the_run_of_one_process(plan):
    for found, *_ in run_ranks(with_heads, 2, plan, 2, gradient_as_bucket_view=True):
        assert_equal(found, with_heads_in_one_process(plan, 2))


# Ranks that run out of batches


def uneven(steps, ways):
    return [uneven_one_way(steps, *way) for way in ways]


def uneven_one_way(steps, heads, looks):
    accelerator = started(find_unused_parameters=looks)
    rank = accelerator.process_index
    model = TwoHeads()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with accelerator.join_uneven_inputs([model]):
        for x in inputs(rank, steps[rank]):
            accelerator.backward(model(x, heads).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    return parameters_of(model.module)


def uneven_in_one_process(steps, heads):
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(max(steps)):
        present = [inputs(rank, number)[step] for rank, number in enumerate(steps) if step < number]
        (sum(model(x, heads).square().mean() for x in present) / len(steps)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model)


@pytest.mark.parametrize("steps", [(2, 4), (3, 0), (1, 3, 2)], ids=str)
def test_a_rank_without_batches_takes_part_without_gradients(steps):
    ways = [("ab", "auto"), ("a", "auto"), ("a", True)]
    for runs in run_ranks(uneven, len(steps), steps, ways):
        for (heads, _), found in zip(ways, runs, strict=True):
            assert_equal(found, uneven_in_one_process(steps, heads))


def joined_with(kind):
    accelerator = started(sync_batchnorm=kind == "BatchNorm", static_graph=kind == "static_graph")
    model = accelerator.prepare(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    with pytest.raises(StrategyError) as caught:
        accelerator.join_uneven_inputs(model)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["BatchNorm", "static_graph"])
def test_models_that_a_rank_without_batches_could_not_follow_are_refused(kind):
    for text in run_ranks(joined_with, 2, kind):
        assert text.startswith("error[D0810]")
        assert kind in text


def test_in_one_process_nothing_is_joined():
    accelerator = Accelerator(cpu=True, strategy="single")
    model = accelerator.prepare(nn.Linear(2, 2))
    with accelerator.join_uneven_inputs(model) as nothing:
        assert nothing is None
    accelerator.end_training()


@pytest.mark.parametrize("even_batches", [True, False])
def test_even_batches_is_warned_about(even_batches):
    accelerator = Accelerator(cpu=True, strategy="single")
    with pytest.warns(UserWarning, match=f"even_batches={even_batches} has no meaning here") as caught:
        accelerator.join_uneven_inputs([nn.Linear(2, 2)], even_batches=even_batches)
    assert caught[0].filename == __file__
    accelerator.end_training()


# Batch normalization


SHAPES = {nn.BatchNorm1d: (), nn.BatchNorm2d: (2, 3), nn.BatchNorm3d: (2, 1, 2)}
KINDS = [(nn.BatchNorm1d, {}), (nn.BatchNorm2d, {"momentum": None}), (nn.BatchNorm3d, {"affine": False})]


class Normalized(nn.Module):
    def __init__(self, kind, options):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(3, 4), kind(4, **options), nn.Linear(4, 1)
        self.double()

    def forward(self, x):
        x = self.first(x).movedim(-1, 1) if x.dim() > 2 else self.first(x)
        x = self.norm(x)
        return self.last(x.movedim(1, -1) if x.dim() > 2 else x)


def rows(sizes, kind, step):
    draw = torch.Generator().manual_seed(step)
    whole = torch.randn(sum(sizes), *SHAPES[kind], 3, generator=draw, dtype=torch.float64) * 2 + 5
    return whole.split(sizes)


def loss_of(model, x, number):
    """Sum over rows, so that a rank's share may have any size."""
    return model(x).square().flatten(1).mean(1).sum() / number


def normalizing(sizes):
    return [normalizing_one_kind(kind, options, sizes) for kind, options in KINDS]


def normalizing_one_kind(kind, options, sizes):
    accelerator = started(sync_batchnorm=True)
    model = Normalized(kind, options)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    for step in range(4):
        mine = rows(sizes, kind, step)[accelerator.process_index]
        accelerator.backward(loss_of(model, mine, sum(sizes)) * accelerator.num_processes)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return parameters_of(model.module), model(rows(sizes, kind, 9)[0]).detach()


def normalizing_in_one_process(kind, options, sizes):
    model = Normalized(kind, options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(4):
        loss_of(model, torch.cat(rows(sizes, kind, step)), sum(sizes)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return parameters_of(model), model(rows(sizes, kind, 9)[0]).detach()


@pytest.mark.parametrize("sizes", [(3, 3), (5, 1), (4, 0), (2, 1, 4)], ids=str)
def test_synchronized_batchnorm_is_batchnorm_of_the_whole_micro_step(sizes):
    expected = [normalizing_in_one_process(kind, options, sizes) for kind, options in KINDS]
    for runs in run_ranks(normalizing, len(sizes), sizes):
        for (found, output), (true, true_output) in zip(runs, expected, strict=True):
            assert_equal(found, true)
            torch.testing.assert_close(output, true_output, rtol=1e-12, atol=1e-14)


def second_derivative(world_size):
    """Return the gradient of a gradient penalty, computed by all ranks or by this process alone."""
    accelerator = started(sync_batchnorm=True)
    model = Normalized(nn.BatchNorm1d, {})
    parts = rows((2, 3), nn.BatchNorm1d, 0)
    alone = accelerator.num_processes == 1
    x = (torch.cat(parts) if alone else parts[accelerator.process_index]).requires_grad_()
    if not alone:
        batchnorm.synchronize_batchnorm(model, on_host=True)
    (slope,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
    slope.square().sum().backward()
    return accelerator.reduce({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_synchronized_batchnorm_can_be_differentiated_twice():
    expected = run_ranks(second_derivative, 1, 1)[0]
    for found in run_ranks(second_derivative, 2, 2):
        assert_equal(found, expected)


def converted_in_place():
    accelerator = started(sync_batchnorm=True)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.SyncBatchNorm(4))
    modules, parameters, names = list(model), list(model.parameters()), list(model.state_dict())
    hooked = []
    model[1].register_forward_hook(lambda *_: hooked.append(True))
    wrapped = accelerator.prepare(model)
    wrapped(torch.ones(2, 3))
    return (
        accelerator.unwrap_model(wrapped) is model,
        all(x is y for x, y in zip(model, modules, strict=True)),
        all(x is y for x, y in zip(model.parameters(), parameters, strict=True)),
        list(model.state_dict()) == names,
        isinstance(model[1], nn.BatchNorm1d),
        hooked == [True],
    )


def test_a_converted_model_keeps_its_modules_parameters_names_and_hooks():
    assert run_ranks(converted_in_place, 2) == [(True,) * 6] * 2


def saved_and_exported(folder):
    accelerator = started(sync_batchnorm=True, folder=folder)
    model = accelerator.prepare(Normalized(nn.BatchNorm1d, {}))
    model(rows((3, 2), nn.BatchNorm1d, 0)[accelerator.process_index])
    accelerator.save_state(Path(folder) / "state")
    accelerator.save_model(model, Path(folder) / "export")
    return parameters_of(model.module)


def test_a_converted_model_is_saved_and_exported_as_a_plain_one(tmp_path):
    expected = run_ranks(saved_and_exported, 2, tmp_path)[0]
    plain = Normalized(nn.BatchNorm1d, {})
    plain.load_state_dict(load_file(tmp_path / "export" / "model.safetensors"), strict=True)
    assert_equal(parameters_of(plain), expected, rtol=0)

    accelerator = Accelerator(cpu=True, strategy="single")
    loaded = accelerator.prepare(Normalized(nn.BatchNorm1d, {}))
    accelerator.load_state(tmp_path / "state")
    accelerator.end_training()
    assert_equal(parameters_of(loaded), expected, rtol=0)


class Activated(nn.BatchNorm2d):
    """A user's own, which does more."""

    def forward(self, x):
        return super().forward(x).relu()


def own_class():
    accelerator = started(sync_batchnorm=True)
    model = nn.Sequential(nn.BatchNorm2d(3), Activated(3))
    with pytest.raises(StrategyError) as caught:
        accelerator.prepare(model)
    return str(caught.value), [type(x) for x in model] == [nn.BatchNorm2d, Activated]


def test_a_class_of_the_users_own_is_refused_and_nothing_is_changed():
    for text, unchanged in run_ranks(own_class, 2):
        assert text.startswith("error[D0808]")
        assert "cannot convert 1: Activated is not torch's" in text
        assert unchanged


def low_precision():
    started()
    norm = nn.BatchNorm1d(3)
    batchnorm.synchronize_batchnorm(norm, on_host=True)
    out = norm(torch.randn(4, 3, dtype=torch.bfloat16))
    return out.dtype, norm.running_var.dtype


def test_synchronized_batchnorm_keeps_a_low_precision_and_its_statistics_do_not():
    assert run_ranks(low_precision, 2) == [(torch.bfloat16, torch.float32)] * 2


def one_value():
    accelerator = started(sync_batchnorm=True)
    model = accelerator.prepare(Normalized(nn.BatchNorm1d, {}))
    with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
        model(rows((1, 0), nn.BatchNorm1d, 0)[accelerator.process_index])
    return str(caught.value)


def test_one_value_over_all_ranks_is_refused_on_every_rank():
    first, second = run_ranks(one_value, 2)
    assert first == second


def warnings_of(kind):
    accelerator = started(sync_batchnorm=kind == "synchronized")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind != "plain":
            accelerator.prepare(Normalized(nn.BatchNorm1d, {}))
            accelerator.prepare_model(Normalized(nn.BatchNorm1d, {}))
        accelerator.prepare(TwoHeads())
    return [(str(x.message), x.filename) for x in caught]


def test_batchnorm_of_each_rank_is_warned_about_once_where_prepare_is_called():
    main, other = run_ranks(warnings_of, 2, "each rank")
    [(text, file)] = main
    assert "BatchNorm sees only the rank's own micro-batch (norm)" in text
    assert "sync_batchnorm: true" in text
    assert file == __file__
    assert other == []


@pytest.mark.parametrize(("kind", "world_size"), [("plain", 2), ("synchronized", 2), ("each rank", 1)])
def test_nothing_is_warned_about_without_such_a_batchnorm(kind, world_size):
    assert run_ranks(warnings_of, world_size, kind) == [[]] * world_size


# Models of all kinds


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed((x.abs() * 2).long() % 5).mean(1))


class PartlyFrozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)
        self.body.weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.body(x).tanh())


class Mixed(nn.Module):
    """float64 and float32 side by side."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(3, 3), nn.Linear(3, 1)

    def double(self):
        self.wide.double()
        return self

    def forward(self, x):
        return self.narrow(self.wide(x).tanh().float()).double()


class Counting(nn.Module):
    """A buffer that every forward changes, equally on all ranks, and uses."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.body(x) * self.calls


ZOO = {kind.__name__: kind for kind in (Tied, PartlyFrozen, Mixed, Counting)}


def made(name):
    torch.manual_seed(0)
    return ZOO[name]().double()


def train_the_zoo(shares):
    """Train each model on this rank's rows of each batch, `shares[rank]`; on all of them if it is alone."""
    return {name: train_one(name, shares) for name in ZOO}


def train_one(name, shares):
    accelerator = started()
    model = made(name)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    for batch in inputs(5, 5):
        mine = batch[shares[accelerator.process_index]] if accelerator.num_processes > 1 else batch
        accelerator.backward(model(mine).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(accelerator.unwrap_model(model))


def test_models_of_every_kind_have_the_parameters_of_one_process():
    shares = [slice(0, 2), slice(2, 4)]
    expected = run_ranks(train_the_zoo, 1, shares)[0]
    for found in run_ranks(train_the_zoo, 2, shares):
        for name in ZOO:
            assert_equal(
                found[name], expected[name], rtol=2e-6 if name == "Mixed" else 1e-12
            )  # float32 rounds


def several_models():
    """A student learns from a frozen teacher while a generator and a critic train against each other."""
    accelerator = started()
    torch.manual_seed(0)
    student, teacher, generator, critic = (nn.Linear(3, 3).double() for _ in range(4))
    teacher.requires_grad_(False)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (student, generator, critic)]
    student, teacher, generator, critic, *optimizers = accelerator.prepare(
        student, teacher, generator, critic, *optimizers
    )
    of_student, of_generator, of_critic = optimizers
    for batch in inputs(5, 5):
        mine = batch.chunk(accelerator.num_processes)[accelerator.process_index]
        accelerator.backward((student(mine) - teacher(mine)).square().mean())
        of_student.step()
        of_student.zero_grad()
        fake = generator(mine)
        real_score, fake_score = critic(mine), critic(fake.detach())
        accelerator.backward(real_score.square().mean())
        accelerator.backward(-fake_score.tanh().mean())
        of_critic.step()
        of_critic.zero_grad()
        accelerator.backward(critic(fake).tanh().mean())
        of_generator.step()
        of_generator.zero_grad()
        of_critic.zero_grad()
    plain = [accelerator.unwrap_model(m) for m in (student, teacher, generator, critic)]
    return {
        f"{i}.{name}": x.detach().clone() for i, m in enumerate(plain) for name, x in m.state_dict().items()
    }


def test_several_models_have_the_parameters_of_one_process():
    expected = run_ranks(several_models, 1)[0]
    for found in run_ranks(several_models, 2):
        assert_equal(found, expected)


def train_with_buffers(folder, first, stop):
    """Go on from the newest checkpoint, if there is one, and leave one at step `stop`."""
    warnings.simplefilter("ignore")  # BatchNorm of each rank is what this is about
    accelerator = started(folder=folder)
    model = Normalized(nn.BatchNorm1d, {})
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    if first:
        accelerator.load_state(Path(folder) / str(first))
    for step in range(first, stop):
        mine = rows((4, 3), nn.BatchNorm1d, step)[accelerator.process_index]
        model.eval()  # what is normalized depends on the running statistics
        loss = loss_of(model, mine, 7)
        model.train()
        accelerator.backward(loss + loss_of(model, mine, 7))
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == 3 or step + 1 == stop:
            accelerator.save_state(Path(folder) / str(step + 1))
    return accelerator.get_state_dict(model)


def test_a_resumed_run_has_the_buffers_of_the_uninterrupted_one(tmp_path):
    whole = run_ranks(train_with_buffers, 2, tmp_path, 0, 6)
    resumed = run_ranks(train_with_buffers, 2, tmp_path, 3, 6)
    for found in [*whole, *resumed]:
        assert_equal(found, whole[0], rtol=0)
