"""What Megatron's optimizers keep for a parameter, and which of them cannot be pruned: asked of real ones."""

from argparse import Namespace

import pytest

from tests.mcore.test_optimizer_state import Trainee, start
from tests.support.forks import in_megatron
from tests.support.jobs import assert_complaint, job, parsed
from tests.support.runs import run_megatron, tiny_arguments


def kept(kind: str, momentum: float = 0.9) -> dict[str, tuple[int, int]]:
    """For a matrix of an expert and for a norm: tensors of the parameter's shape in its state, and what we say."""
    from megatron_laep.mcore.optimizer_kinds import moments

    start()
    trainee = Trainee("fp32", chained=True, seed=1, optimizer=kind)
    for group in trainee.optimizer.param_groups:
        if kind == "sgd":
            group["momentum"] = momentum
    trainee.train(1, lr=1e-2)
    states = [part.optimizer.state for part in trainee.optimizer.chained_optimizers]
    args = Namespace(optimizer=kind, sgd_momentum=momentum, muon_scalar_optimizer="adam")
    parameters = dict(trainee.core.named_parameters())
    names = {
        "expert": "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight",
        "norm": "decoder.final_layernorm.weight",
    }
    found = {}
    for what, name in names.items():
        parameter = parameters[name]
        state = next((state[parameter] for state in states if parameter in state), {})
        tensors = [v for v in state.values() if getattr(v, "shape", None) == parameter.shape]
        found[what] = len(tensors), moments(parameter, args)
    return found


@pytest.mark.parametrize(
    "kind, expert, norm",
    [("adam", 2, 2), ("sgd", 1, 1), ("lion", 1, 2), ("muon", 1, 2)],
)
def test_moments(kind, expert, norm):
    assert in_megatron(kept, kind).result() == {"expert": (expert,) * 2, "norm": (norm,) * 2}


def test_sgd_without_momentum_keeps_nothing():
    assert in_megatron(kept, "sgd", 0.0).result() == {"expert": (0, 0), "norm": (0, 0)}


def test_stock_megatron_cannot_save_soap(tmp_path):
    """If it could, SOAP might be pruned."""
    flags = {"optimizer": "soap", "train_iters": 1, "save": tmp_path, "save_interval": 1}
    result = run_megatron(tiny_arguments(**flags), 1, check=False)
    assert not result.ok
    assert list(result.exact) == [1], "it trains"
    assert "does not match model shape" in result.output


# -- adaptive Muon ---------------------------------------------------------------------------------


def adaptive_muon(words: list[str], *, complete: bool) -> dict:
    """The job's arguments; complete: where Megatron's class has what the package's reads, as main's has."""
    from megatron.core.optimizer.emerging_optimizers import TensorParallelAdaptiveMuon

    if complete:
        TensorParallelAdaptiveMuon.scale_mode = "spectral"
        TensorParallelAdaptiveMuon.extra_scale_factor = 1.0
    return parsed(words)


def test_adaptive_muon_is_refused_where_it_cannot_take_a_step(tmp_path):
    words = job(tmp_path, optimizer="adaptive_muon")
    outcome = in_megatron(adaptive_muon, words, complete=False)
    assert_complaint(outcome, "--optimizer adaptive_muon", "emerging-optimizers 0.2")
    in_megatron(adaptive_muon, words, complete=True).result()


def test_adaptive_muon_without_the_right_package_does_not_train():
    """If it did, it would be refused for nothing."""
    flags = {"optimizer": "adaptive_muon", "train_iters": 1}
    result = run_megatron(tiny_arguments(**flags), 1, check=False)
    assert not result.ok and not result.exact
    assert "object has no attribute 'scale_mode'" in result.output


# -- accepted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer": "sgd"},
        {"optimizer": "lion"},
        {"optimizer": "muon"},
        {"optimizer": "dist_muon"},
        {"optimizer": "muon", "use_distributed_optimizer": True},
    ],
    ids=str,
)
def test_accepted(tmp_path, flags):
    in_megatron(parsed, job(tmp_path, **flags)).result()
