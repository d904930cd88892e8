"""Optimizer state goes on between chained optimizers (expert parallelism) and a single one.

With real optimizers on a small real model, one process: expert parameters that say they are expert
parallel make Megatron chain two optimizers, whatever the number of ranks. So the same model is
trained with a chain, saved, and loaded into a single optimizer, and the reverse.
"""

import os

import pytest

from tests.support.forks import in_megatron, init_process_group

KINDS = {
    "fp32": "FP32Optimizer",
    "bf16": "Float16OptimizerWithFloat16Params",
    "distributed": "DistributedOptimizer",
}


# -- what runs where Megatron is -------------------------------------------------------------------


def start() -> None:
    from megatron.core import parallel_state, tensor_parallel

    init_process_group()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


class Trainee:
    """A MoE GPT with its optimizer: two layers, four experts, weights by seed."""

    def __init__(
        self,
        kind: str,
        *,
        chained: bool,
        seed: int,
        sharding: str = "fully_reshardable",
        fp32: bool = False,
        bucket_size: int | None = None,
        optimizer: str = "adam",
    ):
        """fp32: parameters, also of the distributed optimizer; bucket_size: in elements, None for one bucket;
        optimizer: as --optimizer."""
        import torch
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.enums import AttnBackend
        from megatron.core.transformer.module import Float16Module
        from megatron.core.transformer.transformer_config import TransformerConfig

        bf16, distributed = kind != "fp32" and not fp32, kind == "distributed"
        dtype = torch.bfloat16 if bf16 else torch.float32
        config = TransformerConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=2,
            ffn_hidden_size=8,
            num_moe_experts=4,
            moe_ffn_hidden_size=8,
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type="alltoall",
            add_bias_linear=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bf16=bf16,
            params_dtype=dtype,
            use_cpu_initialization=True,
            attention_backend=AttnBackend.unfused,
        )
        torch.manual_seed(seed)
        self.core = GPTModel(
            config,
            get_gpt_decoder_block_spec(config, use_transformer_engine=False),
            vocab_size=64,
            max_sequence_length=8,
            position_embedding_type="rope",
        )
        for name, parameter in self.core.named_parameters():
            if ".experts." in name:
                parameter.allreduce = not chained
        self.model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=distributed,
                overlap_grad_reduce=bucket_size is not None,
                bucket_size=bucket_size,
            ),
            Float16Module(config, self.core) if bf16 else self.core,
        )
        # Without clipping, since the norm of a chain is summed in another order.
        optimizer_config = OptimizerConfig(
            optimizer=optimizer,
            lr=1e-2,
            weight_decay=0.1,
            clip_grad=0.0,
            bf16=bf16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
        )
        self.optimizer = get_megatron_optimizer(optimizer_config, [self.model])
        self.metadata = {
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        if distributed:
            self.metadata["distrib_optim_sharding_type"] = sharding

    def optimizers(self) -> list[str]:
        return [type(part).__name__ for part in self.optimizer.chained_optimizers]

    def train(self, steps: int, lr: float) -> None:
        import torch

        tokens = torch.arange(16).view(2, 8)
        positions = torch.arange(8).expand(2, 8)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for _ in range(steps):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            loss = self.model(tokens, positions, None, labels=tokens).float().mean()
            loss.backward()
            self.model.finish_grad_sync()
            assert self.optimizer.step()[0]

    def weights(self) -> dict:
        return {name: p.detach().clone() for name, p in self.core.named_parameters()}

    def _sharded(self, is_loading: bool) -> dict:
        model = self.core.sharded_state_dict(metadata=self.metadata)
        optimizer = self.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=self.metadata
        )
        return {"model": model, "optimizer": optimizer}

    def save(self, name: str) -> str:
        from megatron.core import dist_checkpointing

        path = os.path.join(os.environ["IN_MEGATRON_SCRATCH"], name)
        os.mkdir(path)
        dist_checkpointing.save(self._sharded(is_loading=False), path)
        return path

    def load(self, path: str) -> None:
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load(self._sharded(is_loading=True), path)
        self.core.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def equal(one: dict, other: dict) -> bool:
    import torch

    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def carry_over(kind: str) -> None:
    """From a chain to one optimizer and back: the same weights as without the loads."""
    from megatron_laep.mcore.checkpoint import adapting_optimizer_state

    start()
    before = Trainee(kind, chained=True, seed=1)
    assert before.optimizers() == [KINDS[kind]] * 2
    before.train(3, lr=1e-2)
    path = before.save("before")

    after = Trainee(kind, chained=False, seed=2)
    assert after.optimizers() == [KINDS[kind]]
    assert not equal(before.weights(), after.weights())
    with adapting_optimizer_state():
        after.load(path)
    assert equal(before.weights(), after.weights())
    for group in after.optimizer.param_groups:
        assert (group["step"], group["lr"]) == (3, 1e-2)
        assert not group["is_expert_parallel"]

    before.train(3, lr=5e-3)
    after.train(3, lr=5e-3)
    assert equal(before.weights(), after.weights())

    back = Trainee(kind, chained=True, seed=3)
    with adapting_optimizer_state():
        back.load(after.save("after"))
    before.train(3, lr=5e-3)
    back.train(3, lr=5e-3)
    assert equal(before.weights(), back.weights())


def load_without_help(kind: str) -> None:
    start()
    chain = Trainee(kind, chained=True, seed=1)
    chain.train(1, lr=1e-2)
    Trainee(kind, chained=False, seed=2).load(chain.save("chained"))


def keep_the_nesting(kind: str, sharding: str) -> None:
    """Equal nestings load as ever, whatever the format; adapt hands back the very same value."""
    from megatron.core import dist_checkpointing

    from megatron_laep.mcore.checkpoint import adapting_optimizer_state
    from megatron_laep.mcore.optimizer_state import adapt_common_state

    start()
    for chained in (True, False):
        before = Trainee(kind, chained=chained, seed=1, sharding=sharding)
        before.train(2, lr=1e-2)
        path = before.save(f"saved-{chained}")
        common = dist_checkpointing.load_common_state_dict(path)["optimizer"]
        after = Trainee(kind, chained=chained, seed=2, sharding=sharding)
        assert adapt_common_state(common, after._sharded(is_loading=True)["optimizer"]) is common
        with adapting_optimizer_state():
            after.load(path)
        before.train(2, lr=1e-2)
        after.train(2, lr=1e-2)
        assert equal(before.weights(), after.weights())


def renest_buffers() -> None:
    from megatron_laep.mcore.checkpoint import adapting_optimizer_state

    start()
    chain = Trainee("distributed", chained=True, seed=1, sharding="dp_reshardable")
    chain.train(1, lr=1e-2)
    path = chain.save("chained")
    with adapting_optimizer_state():
        Trainee("distributed", chained=False, seed=2, sharding="dp_reshardable").load(path)


def renest_changed(kind: str, change: str) -> None:
    """Adapt the common state of a real chained checkpoint after a change of one group."""
    from megatron.core import dist_checkpointing

    from megatron_laep.mcore.optimizer_state import adapt_common_state

    start()
    chain = Trainee(kind, chained=True, seed=1)
    chain.train(1, lr=1e-2)
    common = dist_checkpointing.load_common_state_dict(chain.save("chained"))["optimizer"]
    single = Trainee(kind, chained=False, seed=2)
    if change == "experts learn faster":
        inner = common[1] if kind == "fp32" else common[1]["optimizer"]
        inner["param_groups"][0]["lr"] = 0.02
    else:
        for group in single.optimizer.param_groups:
            group["wd_mult"] = 0.5
    adapt_common_state(common, single._sharded(is_loading=True)["optimizer"])


def adapted_groups(kind: str) -> tuple[list[dict], list[dict]]:
    """Groups of a single optimizer's checkpoint, and what a chain gets of them."""
    from megatron.core import dist_checkpointing

    from megatron_laep.mcore.optimizer_state import adapt_common_state

    start()
    single = Trainee(kind, chained=False, seed=1)
    single.train(1, lr=1e-2)
    common = dist_checkpointing.load_common_state_dict(single.save("single"))["optimizer"]
    chain = Trainee(kind, chained=True, seed=2)
    adapted = adapt_common_state(common, chain._sharded(is_loading=True)["optimizer"])
    assert list(adapted) == [0, 1]

    def groups(part: dict) -> list[dict]:
        return part["param_groups"] if kind == "fp32" else part["optimizer"]["param_groups"]

    return groups(common), [group for part in adapted.values() for group in groups(part)]


def completed(saved: dict) -> dict:
    from megatron_laep.mcore.optimizer_state import complete_common_state

    complete_common_state(saved)
    return saved


# -- the tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_exactly_with_the_other_nesting(kind):
    in_megatron(carry_over, kind).result()


@pytest.mark.parametrize(
    "kind, error", [("fp32", "ValueError"), ("bf16", "ValueError"), ("distributed", "KeyError")]
)
def test_megatron_alone_does_not_load_the_other_nesting(kind, error):
    """If it did, optimizer_state would be superfluous."""
    assert in_megatron(load_without_help, kind).error == error


@pytest.mark.parametrize(
    "kind, sharding",
    [
        ("fp32", ""),
        ("bf16", ""),
        ("distributed", "fully_reshardable"),
        ("distributed", "dp_reshardable"),
    ],
)
def test_equal_nestings_are_left_alone(kind, sharding):
    in_megatron(keep_the_nesting, kind, sharding).result()


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_a_chain(kind):
    """Dense groups with and without weight decay; experts have no biases, so one group."""
    saved, adapted = in_megatron(adapted_groups, kind).result()
    assert [group["wd_mult"] for group in saved] == [1.0, 0.0]
    flags = ("wd_mult", "is_expert_parallel")
    assert [tuple(group[flag] for flag in flags) for group in adapted] == [
        (1.0, False),
        (0.0, False),
        (1.0, True),
    ]
    rest = {key: value for key, value in saved[0].items() if key not in (*flags, "params")}
    for group in adapted:
        assert {key: group[key] for key in rest} == rest


def test_buffers_cannot_be_renested():
    outcome = in_megatron(renest_buffers)
    assert outcome.error == "Refusal"
    for text in ("dp_reshardable", "--dist-ckpt-optim-fully-reshardable", "--expert-model-"):
        assert text in outcome.message


@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_differ_do_not_become_one(kind):
    outcome = in_megatron(renest_changed, kind, "experts learn faster")
    assert outcome.error == "Refusal"
    for text in ("'lr': 0.01", "'lr': 0.02", "would have to become one", "expert-parallel size"):
        assert text in outcome.message


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_the_checkpoint_lacks(kind):
    outcome = in_megatron(renest_changed, kind, "other weight decay")
    assert outcome.error == "Refusal"
    for text in ("no parameter group with", "'wd_mult': 0.5", "same optimizer flags"):
        assert text in outcome.message


def test_what_rank_0_could_not_know_is_filled_in():
    """It has dense parameters only: the experts' optimizer has taken no step there, and has no masters."""
    dense = {
        "optimizer": {"param_groups": [{"step": 7, "lr": 0.5}]},
        "fp32_from_fp16_params": [[1]],
    }
    experts = {
        "optimizer": {"param_groups": [{"step": 0, "lr": 0.5}]},
        "fp32_from_fp16_params": [[]],
    }
    found = in_megatron(completed, {0: dense, 1: experts}).result()
    assert found[0] == dense
    assert found[1] == {"optimizer": {"param_groups": [{"step": 7, "lr": 0.5}]}}


def test_another_kind_of_optimizer_keeps_its_own_step():
    groups = [{"optimizer": "muon"}, {"optimizer": "adam", "step": 3}, {"step": 5}]
    found = in_megatron(completed, {"param_groups": groups}).result()
    assert found == {"param_groups": groups}
