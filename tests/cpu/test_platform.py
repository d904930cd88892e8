"""Stock Megatron on the CPU platform: it trains, it learns, it resumes, in every parallelism the
CPU can hold.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_laep import cpu
from megatron_laep.cpu.fused_adam import FusedAdam
from megatron_laep.cpu.norm import build_norm
from tests.support.forks import on_ranks
from tests.support.runs import PRETRAIN_GPT, REPOSITORY, RunResult, run_megatron, tiny_arguments

ITERATIONS = 10
HALF = ITERATIONS // 2


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh process, without MEGATRON_LAEP_PLATFORM unless it is given."""
    env = {name: value for name, value in os.environ.items() if name != cpu.ENVIRONMENT_VARIABLE}
    env |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=90
    )


# --------------------------------------------------------------------------------------------------
# Switching it on


@pytest.mark.parametrize(
    ("value", "expected"),
    [("cpu", True), ("cpu-force", True), ("gpu", False), ("", False), (None, False)],
)
def test_requested_reads_the_environment(monkeypatch, value, expected):
    monkeypatch.delenv(cpu.ENVIRONMENT_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, value)
    assert cpu.requested() is expected


def test_unknown_platform_is_an_error(monkeypatch):
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, "tpu")
    with pytest.raises(
        ValueError, match=r"MEGATRON_LAEP_PLATFORM: got 'tpu', wanted one of gpu, cpu, cpu-force"
    ):
        cpu.requested()


def test_arguments_are_a_copy():
    cpu.cpu_arguments().clear()
    assert "gloo" in cpu.cpu_arguments()


def test_importing_the_package_changes_nothing():
    result = run_python(
        "import sys, megatron_laep\n"
        "assert 'megatron_laep.cpu' not in sys.modules\n"
        "from megatron_laep import cpu\n"
        "assert not cpu.is_enabled()\n"
        "assert 'torch' not in sys.modules or not sys.modules['torch'].cuda.is_available()\n"
    )
    assert result.returncode == 0, result.stderr


def test_refuses_after_megatron_was_imported():
    result = run_python(
        "import megatron.core\n"
        "from megatron_laep import cpu\n"
        "try:\n"
        "    cpu.enable(force=True)\n"
        "except ValueError as error:\n"
        "    print(error, cpu.is_enabled())\n"
    )
    assert "is already imported" in result.stdout and "call enable() first" in result.stdout, (
        result.stderr
    )
    assert result.stdout.strip().endswith("False")


# A GPU is pretended: there is none here, and where there is one the platform is not wanted.
PRETEND_GPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 3
from megatron_laep import cpu
"""


def test_refuses_beside_a_visible_gpu():
    result = run_python(
        PRETEND_GPU + "try:\n    cpu.enable()\n"
        "except ValueError as error:\n    print(error, cpu.is_enabled())\n"
    )
    assert "3 GPU(s) are visible" in result.stdout and "cpu-force" in result.stdout, result.stderr
    assert result.stdout.strip().endswith("False")


@pytest.mark.parametrize(
    ("call", "environment"),
    [("cpu.enable(force=True)", {}), ("cpu.enable()", {cpu.ENVIRONMENT_VARIABLE: "cpu-force"})],
)
def test_can_be_forced_beside_a_visible_gpu(call, environment):
    result = run_python(
        PRETEND_GPU + f"{call}\nprint(cpu.is_enabled(), torch.ones(1, device='cuda'))",
        **environment,
    )
    assert "True tensor([1.])" in result.stdout, result.stderr


def test_what_enable_does_to_torch():
    """Devices, types, random numbers, streams, compile; twice enabled is enabled once."""
    result = run_python("""
from megatron_laep import cpu
cpu.enable()
import torch
empty = torch.empty
cpu.enable()
assert torch.empty is empty

cpu_device = torch.device("cpu")
made = [
    torch.zeros(2, device="cuda"),
    torch.tensor([1.0], device=torch.device("cuda", 0)),
    torch.arange(3, device=torch.cuda.current_device()),
    torch.empty_like(torch.ones(2), device="cuda:0"),
    torch.ones(2).to("cuda"),
    torch.ones(2).to(device="cuda", dtype=torch.bfloat16),
    torch.ones(2).to(torch.cuda.current_device()),
    torch.ones(2).new_zeros(3, device="cuda"),
    torch.ones(2).cuda(),
    next(torch.nn.Linear(2, 2).to("cuda").parameters()),
    next(torch.nn.Linear(2, 2, device="cuda").parameters()),
]
assert all(tensor.device == cpu_device for tensor in made), made
assert all(tensor.is_cuda for tensor in made)
assert torch.ones(1, device="meta").device.type == "meta"
with torch.device("meta"):
    assert torch.empty(1).device.type == "meta"
    assert not torch.empty(1).is_cuda

assert torch.ones(1).to(torch.float64).dtype == torch.float64
assert torch.ones(1).to(torch.ones(1, dtype=torch.int8)).dtype == torch.int8
assert torch.ones(1).type() == "torch.cuda.FloatTensor"
assert torch.ones(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
assert torch.ones(1).type("torch.cuda.LongTensor").dtype == torch.int64
assert torch.ones(1).type(torch.int32).dtype == torch.int32

torch.manual_seed(5)
first = torch.rand(3)
torch.cuda.manual_seed(5)
state = torch.cuda.get_rng_state()
assert torch.equal(torch.rand(3, device="cuda"), first)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(3), first)

start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
with torch.cuda.stream(torch.cuda.Stream()):
    start.record()
    end.record()
assert 0.0 <= start.elapsed_time(end) < 1000.0

assert torch.compile(len) is len
assert torch.compile(dynamic=True)(len) is len
parameter = torch.nn.Parameter(torch.ones(1))
parameter.grad = torch.ones(1)
torch.optim.AdamW([parameter]).step()
""")
    assert result.returncode == 0, result.stderr


def test_devices_are_translated_in_other_threads():
    """Autograd and checkpoint writers have threads of their own, which a torch function mode would
    not reach.
    """
    result = run_python("""
import threading
from megatron_laep import cpu
cpu.enable()
import torch
seen = []
thread = threading.Thread(target=lambda: seen.append(torch.zeros(1, device="cuda").device.type))
thread.start()
thread.join()
assert seen == ["cpu"], seen
""")
    assert result.returncode == 0, result.stderr


# --------------------------------------------------------------------------------------------------
# Its collectives


def gathered(sizes: list[int], async_op: bool) -> list[list[float]]:
    """What this rank gets of all ranks' numbers, of which each has another number."""
    rank = torch.distributed.get_rank()
    mine = torch.full((sizes[rank],), float(rank + 1))
    parts = [torch.zeros(size) for size in sizes]
    work = torch.distributed.all_gather(parts, mine, async_op=async_op)
    assert (work is not None) == async_op
    if work is not None:
        work.wait()
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("sizes", [[3, 0, 5], [2, 2, 2], [0, 0, 1]])
def test_ranks_gather_differently_many_numbers(sizes, async_op):
    for outcome in on_ranks(3, gathered, sizes, async_op):
        assert outcome.result() == [[rank + 1.0] * size for rank, size in enumerate(sizes)]


# --------------------------------------------------------------------------------------------------
# Its optimizer and its norm


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fused_adam_is_torchs_adam(adam_w_mode, weight_decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    reference_class = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    ours, reference = start.clone().requires_grad_(), start.clone().requires_grad_()
    our_adam = FusedAdam([ours], adam_w_mode=adam_w_mode, capturable=False, **options)
    reference_adam = reference_class([reference], **options)
    for _ in range(20):
        gradient = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        ours.grad, reference.grad = gradient.clone(), gradient.clone()
        our_adam.step()
        reference_adam.step()
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_fused_adam_keeps_the_step_in_the_group():
    parameter = torch.nn.Parameter(torch.ones(3))
    adam = FusedAdam([{"params": [parameter]}, {"params": []}])
    for _ in range(2):
        parameter.grad = torch.ones(3)
        adam.step()
    state = adam.state_dict()
    assert state["param_groups"][0]["step"] == 2
    assert (
        "step" not in state["param_groups"][1]
    )  # as in TransformerEngine: an empty group takes no steps
    assert set(state["state"][0]) == {"exp_avg", "exp_avg_sq"}


def test_fused_adam_does_not_care_where_a_parameter_lies():
    """The same numbers at another offset, in a buffer of another length, are updated to the same
    bits.
    """
    generator = torch.Generator().manual_seed(1)
    values, gradients = torch.randn(2, 37, generator=generator)
    updated = []
    for before, after in ((0, 0), (1, 0), (5, 3), (16, 11)):
        buffer = torch.nn.Parameter(torch.nn.functional.pad(values, (before, after)))
        buffer.grad = torch.nn.functional.pad(gradients, (before, after))
        adam = FusedAdam([buffer], weight_decay=0.1)
        for _ in range(3):
            adam.step()
        updated.append(buffer.detach()[before : before + 37])
    assert all(torch.equal(updated[0], other) for other in updated[1:])


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ({"capturable": True}, "--optimizer-cuda-graph"),
        (
            {"master_weights": True, "exp_avg_dtype": torch.float32},
            "--use-precision-aware-optimizer",
        ),
    ],
)
def test_fused_adam_refuses_what_it_does_not_have(option, remedy):
    with pytest.raises(ValueError, match=remedy):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], **option)


@pytest.mark.parametrize(
    ("name", "reference"), [("LayerNorm", torch.nn.LayerNorm), ("RMSNorm", torch.nn.RMSNorm)]
)
def test_norm_is_torchs_and_marked(name, reference):
    norm = build_norm(name, 6, 1e-3)
    data = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(norm(data), reference(6, eps=1e-3)(data))
    parameters = list(norm.parameters())
    assert parameters and all(parameter.sequence_parallel for parameter in parameters)


def test_unknown_norm_is_an_error():
    with pytest.raises(
        ValueError, match="--normalization L2Norm, wanted one of LayerNorm, RMSNorm"
    ):
        build_norm("L2Norm", 6, 1e-3)


# --------------------------------------------------------------------------------------------------
# Training. One corpus, one uninterrupted run that saves half-way, and everything else compared with
# it.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A small corpus of real text: the sources of the standard library's json and email packages,
    as bytes.
    """
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(os.__file__).parent
    command = [sys.executable, str(REPOSITORY / "scripts" / "prepare_data.py")]
    command += [
        str(stdlib / "json"),
        str(stdlib / "email"),
        "--suffix",
        ".py",
        "--output-prefix",
        str(folder / "py"),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return folder / "py"


def train(corpus: Path, **flags) -> RunResult:
    """Two ranks of the tiny model on the corpus."""
    # 257 tokens are padded to a multiple of this times the tensor-parallel size: 260 for 1 and 2.
    defaults = {
        "data_path": corpus,
        "train_iters": ITERATIONS,
        "make_vocab_size_divisible_by": 130,
        "split": "100,0,0",
    }
    return run_megatron(tiny_arguments(**defaults | flags), 2)


def losses(result: RunResult) -> dict[int, float]:
    return {iteration: float.fromhex(loss) for iteration, (loss, _) in result.exact.items()}


def grad_norms(result: RunResult) -> dict[int, float]:
    return {iteration: float.fromhex(norm) for iteration, (_, norm) in result.exact.items()}


def test_learns_real_text(corpus):
    result = train(corpus, expert_model_parallel_size=2, train_iters=40, lr=5e-3)
    values = losses(result)
    assert list(values) == list(range(1, 41))
    # The first loss is a guess over all of the padded vocabulary.
    assert values[1] == pytest.approx(math.log(260), abs=0.15)
    assert sum(values[i] for i in range(36, 41)) / 5 < 3.5


@pytest.fixture(scope="module")
def ep2(corpus, tmp_path_factory) -> tuple[RunResult, Path]:
    """EP 2, uninterrupted, with a torch_dist checkpoint half-way; and where that is."""
    save = tmp_path_factory.mktemp("ep2")
    return train(
        corpus,
        expert_model_parallel_size=2,
        save=save,
        save_interval=HALF,
        ckpt_format="torch_dist",
    ), save


def test_prints_what_the_exact_log_says(ep2):
    """The two readings of a run agree: the printed digits are the exact value, rounded."""
    result, _ = ep2
    for iteration in range(3, ITERATIONS + 1):  # the first two are averaged by Megatron's own log
        assert float(result.losses[iteration]) == pytest.approx(losses(result)[iteration], abs=5e-7)
        assert float(result.grad_norms[iteration]) == pytest.approx(
            grad_norms(result)[iteration], abs=5e-4
        )


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_resume_is_the_uninterrupted_run(corpus, ep2, tmp_path, distributed_optimizer):
    """Both optimizers: what follows after a checkpoint is loaded is the same to the last bit."""
    if distributed_optimizer:
        flags = {"use_distributed_optimizer": True, "expert_model_parallel_size": 2}
        whole = train(
            corpus,
            save=tmp_path,
            save_interval=HALF,
            dist_ckpt_optim_fully_reshardable=True,
            **flags,
        )
        save = tmp_path
    else:
        (whole, save), flags = ep2, {"expert_model_parallel_size": 2}
    resumed = train(corpus, load=save, ckpt_step=HALF, exit_on_missing_checkpoint=True, **flags)
    assert list(resumed.exact) == list(range(HALF + 1, ITERATIONS + 1))
    assert resumed.exact == {iteration: whole.exact[iteration] for iteration in resumed.exact}


def test_distributed_optimizer_is_the_plain_one(corpus, ep2):
    """fp32, the same arithmetic on other slices: the losses agree to within rounding of the
    gradient norm.
    """
    sharded = train(corpus, expert_model_parallel_size=2, use_distributed_optimizer=True)
    assert losses(sharded) == pytest.approx(losses(ep2[0]), rel=1e-5)
    assert grad_norms(sharded) == pytest.approx(grad_norms(ep2[0]), rel=1e-4)


@pytest.fixture(scope="module")
def replicated(corpus, tmp_path_factory) -> tuple[RunResult, Path]:
    """Two data-parallel ranks that hold all experts, with a checkpoint half-way; and where that is.

    With EP 1 the optimizer is one object, not a chain of two, in all of the topologies that load
    it.
    """
    save = tmp_path_factory.mktemp("replicated")
    return train(corpus, save=save, save_interval=HALF, ckpt_format="torch_dist"), save


@pytest.mark.parametrize(
    "topology",
    [
        # The gradient norm tells whether the norms' weights are summed over the tensor-parallel
        # ranks.
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
    ],
    ids=["tensor-and-sequence-parallel", "pipeline-parallel"],
)
def test_other_parallelisms_continue_the_same_training(corpus, replicated, topology):
    """A checkpoint, loaded on another topology, goes on with the same losses and gradient norms."""
    whole, save = replicated
    resumed = train(corpus, load=save, ckpt_step=HALF, exit_on_missing_checkpoint=True, **topology)
    expected = range(HALF + 1, ITERATIONS + 1)
    assert list(resumed.exact) == list(expected)
    assert losses(resumed) == pytest.approx({i: losses(whole)[i] for i in expected}, rel=1e-4)
    assert grad_norms(resumed) == pytest.approx(
        {i: grad_norms(whole)[i] for i in expected}, rel=1e-3
    )


def test_bf16_and_recompute_and_dropout(corpus):
    """The random state that activation recompute restores is the CPU's: with and without, the same
    bits.
    """
    flags = {
        "expert_model_parallel_size": 2,
        "bf16": True,
        "use_distributed_optimizer": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "train_iters": 4,
    }
    stored = train(corpus, **flags)
    recomputed = train(
        corpus,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        **flags,
    )
    assert len(stored.exact) == 4
    assert recomputed.exact == stored.exact


def test_script_runs_twice_in_one_process(corpus, tmp_path):
    """After a rebuild the launcher runs the script again: nothing in it may be left over from the
    first time.
    """
    twice = tmp_path / "twice.py"
    twice.write_text(
        "import runpy, sys\n"
        "if __name__ == '__main__':\n"
        f"    runpy.run_path({str(PRETRAIN_GPT)!r}, run_name='__main__')\n"
        "    from megatron.core import mpu\n"
        "    from megatron.training.global_vars import destroy_global_vars\n"
        "    from megatron.core import num_microbatches_calculator\n"
        "    from megatron.core.rerun_state_machine import destroy_rerun_state_machine\n"
        "    destroy_global_vars()\n"
        "    num_microbatches_calculator.destroy_num_microbatches_calculator()\n"
        "    destroy_rerun_state_machine()\n"
        "    mpu.destroy_model_parallel()\n"
        "    sys.argv[sys.argv.index('--train-iters') + 1] = '3'\n"
        f"    runpy.run_path({str(PRETRAIN_GPT)!r}, run_name='__main__')\n"
    )
    once = train(corpus, expert_model_parallel_size=2, train_iters=2)
    both = run_megatron(
        tiny_arguments(
            data_path=corpus,
            train_iters=2,
            make_vocab_size_divisible_by=130,
            split="100,0,0",
            expert_model_parallel_size=2,
        ),
        2,
        script=twice,
    )
    # The second run's lines take the place of the first's; its first iterations are the same
    # training.
    assert list(both.exact) == [1, 2, 3]
    assert {i: both.exact[i] for i in (1, 2)} == once.exact
    assert both.output.count("[after training is done]") == 2


# --------------------------------------------------------------------------------------------------
# The helper itself


def test_a_failing_run_shows_every_ranks_log():
    with pytest.raises(AssertionError) as failure:
        run_megatron(tiny_arguments(num_experts=7, expert_model_parallel_size=2), 2)
    message = str(failure.value)
    assert "rank 0, exit code" in message and "rank 1, exit code" in message
    assert "Number of experts should be a multiple of expert model parallel" in message


def test_a_hanging_run_is_ended(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    result = run_megatron([], 2, launcher=(), script=script, timeout=3.0, check=False)
    assert result.timed_out and not result.ok
    assert result.returncodes == [-9, -9]
    assert result.seconds < 10.0
    assert "up" in result.logs[1]
