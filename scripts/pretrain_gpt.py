"""Pretrains a GPT or a hybrid stack with Megatron-LM's loop; needs the megatron-core wheel (0.18 or newer) only.

On GPUs:
    torchrun --nproc-per-node 8 scripts/pretrain_gpt.py <Megatron's flags>
With LAEP:
    torchrun --nproc-per-node 8 -m megatron_laep scripts/pretrain_gpt.py <Megatron's, LAEP's flags>

Knows Megatron's parallelisms, mixture of experts, multi-token prediction, blended or mock data. With
--hybrid-layer-pattern it builds what Megatron-LM's pretrain_hybrid.py builds.
Does not know packed sequences (SFT, inter-document masking), fill-in-the-middle, distillation:
Megatron-LM's own pretrain_gpt.py does. The module keeps no state, so that it can be run again in
the same process.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import (
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

try:
    from megatron.training.argument_utils import gpt_config_from_args
except ImportError:
    # 0.18 has no configuration of a GPT: it takes what gpt_model builds.
    gpt_config_from_args = None

TENSORS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")

NOT_SUPPORTED = (
    "sft",
    "fim_data",
    "hybrid_context_parallel",
    "dataloader_inter_document_masking",
    "logits_load_dir",
    "per_dataset_sequences_path",
)

NOT_SUPPORTED_BY_GPT_MODEL = (
    "spec",
    "experimental_attention_variant",
    "heterogeneous_layers_config_path",
    "hybrid_layer_pattern",
    "yaml_cfg",
)

SPIKE = 10  # --check-for-spiky-loss: so many times the largest loss seen before


def has_mtp(args: Any, vp_stage: int | None = None) -> bool:
    """Whether this pipeline stage has multi-token prediction, for which it needs the batch."""
    config = core_transformer_config_from_args(args)
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def get_batch(
    data_iterator: Iterator | None, vp_stage: int | None
) -> dict[str, torch.Tensor | None]:
    """The micro-batch of this rank: {name: tensor or None} for `TENSORS`.

    The first tensor-parallel rank reads it (shape [micro batch, sequence]) and sends it to the
    others; then each context-parallel rank keeps its part of the sequence. Stages inside the
    pipeline need nothing.
    """
    args = get_args()
    mtp = has_mtp(args, vp_stage)
    if not is_first_or_last_pipeline_stage(vp_stage) and not mtp:
        return dict.fromkeys(TENSORS)

    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        for name in TENSORS:
            tensor = sample.get(name)
            batch[name] = None if tensor is None else tensor.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        False,  # no packed sequences; the parameter has another name in 0.18
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return {name: batch.get(name) for name in TENSORS}


def loss_function(
    loss_mask: torch.Tensor, token_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses of the tokens that count, their number, and both together for the log.

    Megatron divides one by the other after it has added up all ranks; the keys and shapes are those
    it expects.
    """
    args = get_args()
    mask = loss_mask.reshape(-1).float()
    loss = (token_losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    rerun = get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks += [("NaN", torch.isnan, True), ("infinity", torch.isinf, True)]
    if args.check_for_spiky_loss:
        spiky = partial(rerun.is_unexpectedly_large, threshold=SPIKE, context="loss")
        checks.append(("a spike", spiky, False))
    for problem, is_bad, fatal in checks:
        rerun.validate_result(
            result=loss,
            rejection_func=is_bad,
            message=f"{problem} in the loss of this rank's micro-batch",
            tolerance=0.0,  # a forward pass repeated gives the same bits
            fatal=fatal,
        )
    report = torch.stack((loss.detach(), tokens.to(loss.dtype)))
    return loss, tokens, {"lm loss": report}


def forward_step(
    data_iterator: Iterator | None, model: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[Any, partial]:
    """One micro-batch forward.

    Returns the model's output (or the plan to compute it) and the function that makes the loss.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()

    # For --overlap-moe-expert-parallel-comm Megatron hands in the model without its wrappers.
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_function, batch["loss_mask"])


def provide_datasets(samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Training, validation and test data; `samples` are the sizes asked for, in this order."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    def built_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and (
            is_first_or_last_pipeline_stage(vp_stage) or has_mtp(args, vp_stage)
        )

    dataset_class = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset_class, samples, built_here, config).build()


def embedding_ranks(pipeline_ranks: list[int]) -> list[int]:
    """The ranks of a pipeline that hold the word embedding.

    The first; the last, if input and output share it; those with multi-token prediction.
    """
    args = get_args()
    ranks = {pipeline_ranks[0]}
    if len(pipeline_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pipeline_ranks[-1])
        ranks.update(get_mtp_ranks(pipeline_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def gpt_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """This rank's part of the GPT, for a Megatron that cannot build it from its configuration."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    with_te = args.transformer_impl == "transformer_engine"
    kinds = {
        "use_transformer_engine": with_te,
        "normalization": args.normalization,
        "qk_l2_norm": args.qk_l2_norm,
        "vp_stage": vp_stage,
    }
    mtp_layers = None
    if args.mtp_num_layers is not None:
        # They are built like the last decoder layer.
        last = get_gpt_decoder_layer_specs(config, **kinds)[-1]
        mtp_layers = get_gpt_mtp_block_spec(
            config, last, use_transformer_engine=with_te, vp_stage=vp_stage
        )
    return GPTModel(
        config,
        get_gpt_decoder_block_spec(config, **kinds),
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        mtp_block_spec=mtp_layers,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def do_without_make() -> None:
    """The wheel has the compiled index helper and no Makefile, at which Megatron would give up."""
    if not (Path(dataset_utils.__file__).parent / "Makefile").exists():
        dataset_utils.compile_helpers = lambda: None


def main() -> None:
    """Parse the command line, build Megatron's configuration, train."""
    do_without_make()
    # Every tensor-parallel group reads its own data, so each rank builds the data sets it needs.
    provide_datasets.is_distributed = True
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    # What only Megatron's own builders know.
    without_config = NOT_SUPPORTED_BY_GPT_MODEL if gpt_config_from_args is None else ()
    for name in (*NOT_SUPPORTED, *without_config):
        if getattr(args, name, False):
            raise ValueError(
                f"scripts/pretrain_gpt.py: got --{name.replace('_', '-')}, which this script does "
                "not know: "
                "use Megatron-LM's own pretrain_gpt.py, which starts under `python -m "
                "megatron_laep` as well"
            )
    builder = {}
    if args.hybrid_layer_pattern is not None:
        model = hybrid_config_from_args(args)
    elif gpt_config_from_args is not None:
        model = gpt_config_from_args(args)
    else:
        model, builder = None, {"model_provider": gpt_model}
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        provide_datasets,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        get_embedding_ranks=embedding_ranks,
        **builder,
    )


if __name__ == "__main__":
    main()
