"""The hooks in Megatron's loop: what is replaced, and what it does with the session.

The loop itself is Megatron's. A run passes by here in this order::

    arguments parsed  -> start.find     which checkpoint, which map
    arguments checked -> Start.checked  are the flags sound, what is still to be pruned
    ranks found       -> agree          does every rank see the same job
    model built       -> set_layer_counts, if there is a map
    checkpoint load   -> Start.loading  through the map, if it is pending
    before iterations -> Running        counters
    each iteration    -> Running.end_iteration; when it is time to prune commit, then Rebuild

Repairs of Megatron's bugs are not here but in ``mcore.upstream_bugs``: hooked only where a bug was shown.
"""

import dataclasses
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import torch
from megatron.core.transformer.multi_token_prediction import get_mtp_layer_offset
from megatron.training import get_args, global_vars
from megatron.training import training as megatron_training
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.checkpointing import get_checkpoint_name

from megatron_laep import events
from megatron_laep.checks import Refusal
from megatron_laep.failure_points import reached
from megatron_laep.loop import commit
from megatron_laep.loop.job import Running
from megatron_laep.loop.retention import keep_prunings
from megatron_laep.loop.session import Rebuild, session
from megatron_laep.loop.start import find
from megatron_laep.mcore import symbols
from megatron_laep.mcore.arguments import check_yaml
from megatron_laep.mcore.captured_graphs import keep_counts
from megatron_laep.mcore.checkpoint import ENTRY, PENDING, Writer
from megatron_laep.mcore.hooks import Hook
from megatron_laep.mcore.moe_layer import (
    LaepMoELayer,
    config_of_layer,
    config_of_mtp,
    in_counting_layers,
    set_layer_counts,
)
from megatron_laep.mcore.quantile_balancing import with_any_experts
from megatron_laep.mcore.rebuild import release
from megatron_laep.mcore.token_dropping import note_choice
from megatron_laep.mcore.upstream_bugs import mend_help
from megatron_laep.mcore.verification import checksums
from megatron_laep.pruned_checkpoint import allow_pruned_checkpoints
from megatron_laep.settings import flags
from megatron_laep.settings.config import LaepConfig


def hooks() -> list[Hook]:
    """What ``install`` replaces in Megatron, in this order; why stands in ``symbol_table``."""
    loop = "megatron.training.training"
    wanted = [
        Hook("megatron.training.arguments:add_megatron_arguments", _add_arguments),
        Hook("megatron.training.arguments:parse_args", _parse_args),
        Hook("megatron.training.arguments:validate_args", _validate_args),
        Hook("megatron.core.parallel_state:initialize_model_parallel", _initialize_model_parallel),
        Hook("megatron.core.models.gpt.moe_module_specs:MoELayer", lambda original: LaepMoELayer),
        Hook(
            "megatron.core.transformer.transformer_block:TransformerBlock._build_layers",
            _build_layers,
        ),
        Hook("megatron.core.models.hybrid.hybrid_block:HybridStack.__init__", _init_hybrid_stack),
        Hook(
            "megatron.core.transformer.transformer_layer:TransformerLayer.__init__",
            _init_transformer_layer,
        ),
        Hook(
            "megatron.core.transformer.multi_token_prediction:MultiTokenPredictionLayer.__init__",
            _init_mtp_layer,
        ),
        Hook(f"{loop}:load_checkpoint", _load_checkpoint),
        Hook(f"{loop}:save_checkpoint", _save_checkpoint),
        Hook("megatron.training.checkpointing:generate_state_dict", _generate_state_dict),
        Hook("megatron.training.checkpointing:_build_sharded_state_dict_metadata", _build_metadata),
        Hook("megatron.training.checkpointing:_async_delete_checkpoint_impl", keep_prunings),
        Hook(f"{loop}:setup_model_and_optimizer", _setup_model_and_optimizer),
        Hook(f"{loop}:training_log", _training_log),
        Hook(f"{loop}:report_theoretical_memory", _report_theoretical_memory),
        Hook(f"{loop}:checkpoint_and_decide_exit", _checkpoint_and_decide_exit),
        Hook(
            "megatron.core.distributed.finalize_model_grads:_update_router_expert_bias",
            _update_router_expert_bias,
        ),
        Hook(
            "megatron.core.distributed.finalize_model_grads:_update_router_qb_beta",
            _update_router_qb_beta,
        ),
        Hook(
            "megatron.core.transformer.moe.router:qb_dual_update",
            lambda original: with_any_experts(original, _pruned),
        ),
        Hook("megatron.core.transformer.moe.router:apply_router_token_dropping", note_choice),
        Hook(
            "megatron.core.transformer.cuda_graphs:TECudaGraphHelper.create_cudagraphs", keep_counts
        ),
    ]
    return [hook for hook in wanted if symbols.is_there(hook.target)]


def _add_arguments(original):
    def add_megatron_arguments(parser: ArgumentParser) -> ArgumentParser:
        parser = original(parser)
        mend_help(parser, session.upstream)
        if flags.given(sys.argv[1:]):
            parser.error = _refuse_usage  # type: ignore[method-assign]
        return flags.add_arguments(parser)

    return add_megatron_arguments


def _refuse_usage(message: str) -> NoReturn:
    """In the place of argparse's own end of a job with flags that it cannot read: hundreds of lines of
    usage from every rank, and an exit code that looks like a crash's."""
    raise Refusal(f"{message}; the same command with --help lists all flags")


def _parse_args(original):
    def parse_args(*more, **named):
        args = original(*more, **named)
        yaml = symbols.argument(args, "yaml_cfg")
        check_yaml(args, sys.argv[1:], from_python=session.config is not None)
        if yaml is None:
            # From here on it is known what was asked for, and not yet whether the loop is Megatron's.
            session.expect(session.config or LaepConfig.from_arguments(args))
        # A YAML job does not pass by validate_args, so it could not follow a pruned checkpoint's map.
        allow_pruned_checkpoints(yaml is None)
        return args

    return parse_args


def _validate_args(original):
    def validate_args(args: Namespace, *more, **named):
        symbols.check_parsed(args)
        if session.config is not None:
            vars(args).update(session.config.to_arguments())
        start = find(
            args,
            LaepConfig.from_arguments(args),
            rebuilt_hash=session.committed_hash,
            can_rebuild=session.inside_run,
        )
        vars(args).update(start.changes)
        result = original(args, *more, **named)
        symbols.check_validated(args)
        start = start.checked(args)
        if start.active:
            session.upstream.check(args, prunes=bool(start.legs))
            events.log("upstream_repairs", **session.upstream.fields)
        session.begin(start)
        return result

    return validate_args


def _initialize_model_parallel(original):
    def initialize_model_parallel(*more, **named):
        session.agree()
        return original(*more, **named)

    return initialize_model_parallel


def _build_layers(original):
    def build_layers(self):
        start = session.active_start
        if start is not None and start.expert_map is not None:
            set_layer_counts(self.config, start.layout())
        return original(self)

    return build_layers


def _init_hybrid_stack(original):
    def init(self, config, submodules, *more, **named):
        start = session.active_start
        if start is not None:
            submodules = in_counting_layers(submodules)
            if start.expert_map is not None:
                set_layer_counts(config, start.layout())
        original(self, config, submodules, *more, **named)

    return init


def _init_transformer_layer(original):
    def init(self, config, submodules, layer_number=1, *more, **named):
        # Only a hybrid stack gives its layers their final numbers.
        if session.active_start is not None and not named.get("add_layer_offset", True):
            config = config_of_layer(config, layer_number)
        original(self, config, submodules, layer_number, *more, **named)

    return init


def _init_mtp_layer(original):
    def init(
        self, config, submodules, layer_number=1, vp_stage=None, *, mtp_layer_pattern=None, **named
    ):
        start = session.active_start
        if start is not None:
            module = layer_number + get_mtp_layer_offset(config, vp_stage)
            before = config.num_layers
            if mtp_layer_pattern is not None:
                before += (module - 1) * len(mtp_layer_pattern)
            config = config_of_mtp(config, before)
            if mtp_layer_pattern is None and start.expert_map is not None:
                set_layer_counts(config, start.layout())
                config = config_of_layer(config, module)
        original(
            self,
            config,
            submodules,
            layer_number,
            vp_stage,
            mtp_layer_pattern=mtp_layer_pattern,
            **named,
        )

    return init


def _load_checkpoint(original):
    def load_checkpoint(ddp_model, optimizer, opt_param_scheduler, *more, **named):
        start = session.active_start
        if start is None:
            return original(ddp_model, optimizer, opt_param_scheduler, *more, **named)
        reached("model built")
        with start.loading(ddp_model, optimizer, get_args()):
            reached("during load")
            result = original(ddp_model, optimizer, opt_param_scheduler, *more, **named)
        start.check_loaded(result[0])
        session.loaded = True
        reached("loaded")
        return result

    return load_checkpoint


def _save_checkpoint(original):
    def save_checkpoint(iteration, *more, non_persistent_ckpt=False, **named):
        start, writer, folder = session.active_start, session.writer, None
        if start is not None and writer is not None:
            if not non_persistent_ckpt:
                # "release" checkpoints are made by other tools.
                folder = get_checkpoint_name(get_args().save, iteration, return_base_dir=True)
                if session.loaded and start.is_from(folder, iteration):
                    # Written in its own place, the only one that the job can go on from is half for a time.
                    events.log("already_saved", iteration=iteration, checkpoint=folder)
                    return
            writer.before_save(iteration, Path(folder) if folder else None)
        with session.saving():
            original(iteration, *more, non_persistent_ckpt=non_persistent_ckpt, **named)

    return save_checkpoint


def _generate_state_dict(original):
    def generate_state_dict(*more, iteration=None, **named):
        state_dict = original(*more, iteration=iteration, **named)
        # Megatron builds the same dict when it loads; only a save has an iteration.
        start = session.active_start
        if start is not None and iteration is not None:
            record = dataclasses.replace(session.record(iteration), writer=Writer.now(start.config))
            if record.map_state == PENDING and session.running is not None:
                sums = checksums(state_dict, record.lineage.steps[-1])
                record = dataclasses.replace(record, checksums=sums)
            state_dict[ENTRY] = record.to_entry()
            reached("during save")
        return state_dict

    return generate_state_dict


def _build_metadata(original):
    def build_sharded_state_dict_metadata(*more, **named):
        metadata = original(*more, **named)
        if session.running is not None and session.running.committing:
            metadata["non_homogeneous_layers"] = True
        return metadata

    return build_sharded_state_dict_metadata


def _setup_model_and_optimizer(original):
    def setup_model_and_optimizer(*more, **named):
        if session.start is None and session.config is not None and session.config.enabled:
            raise Refusal(
                "megatron_laep.install(config) asks for a pruning, but the script has not called "
                "megatron.training.arguments.parse_and_validate_args, where LAEP finds its "
                "checkpoint; parse the arguments with it"
            )
        session.agree()
        start = session.active_start
        if start is None:
            return original(*more, **named)
        reached("groups rebuilt")
        state = start.record.map_state if start.record is not None else None
        with events.timed("build", experts=start.expert_total(), map_state=state):
            result = original(*more, **named)
        if start.pending and not session.loaded:
            raise Refusal(
                f"{start.source}: the model was built for the pending map "
                f"{start.lineage.steps[-1].short_hash}, but no checkpoint was loaded through it; "
                "give --load"
            )
        session.run(Running(start, result[0], get_args()))
        return result

    return setup_model_and_optimizer


def _training_log(original):
    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *more, **named):
        result = original(loss_dict, total_loss_dict, learning_rate, iteration, *more, **named)
        if session.running is not None and iteration % get_args().log_interval == 0:
            session.running.log_loads(
                iteration,
                get_args(),
                tensorboard=global_vars.get_tensorboard_writer(),
                wandb=global_vars.get_wandb_writer(),
            )
        return result

    return training_log


def _report_theoretical_memory(original):
    def report_theoretical_memory(*more, **named):
        if not _pruned():
            return original(*more, **named)
        events.log(
            "theoretical_memory_skipped",
            reason="Megatron's estimate assumes one expert count for all layers",
        )

    return report_theoretical_memory


def _pruned() -> bool:
    """Whether the model that is built has other expert counts than Megatron's arguments say."""
    start = session.active_start
    return start is not None and start.expert_map is not None


def _checkpoint_and_decide_exit(original):
    def checkpoint_and_decide_exit(
        model,
        optimizer,
        opt_param_scheduler,
        iteration,
        num_floating_point_operations_so_far,
        checkpointing_context,
        train_data_iterator,
    ):
        running = session.running

        def step(context=checkpointing_context):
            return original(
                model,
                optimizer,
                opt_param_scheduler,
                iteration,
                num_floating_point_operations_so_far,
                context,
                train_data_iterator,
            )

        def save(context=checkpointing_context):
            megatron_training.save_checkpoint_and_time(
                iteration,
                model,
                optimizer,
                opt_param_scheduler,
                num_floating_point_operations_so_far,
                context,
                train_data_iterator=train_data_iterator,
            )

        def ordinary():
            should_exit = step()
            reached("iteration closed")
            if should_exit or iteration == get_args().train_iters:
                session.end_watch()
            return should_exit

        reached("step done", iteration)
        if running is not None:
            session.watch_progress()
        if running is None or not running.end_iteration(iteration):
            return ordinary()
        with session.saving():
            maybe_finalize_async_save(blocking=True)
        if not commit.has_room(running, iteration, model, get_args()):
            return ordinary()

        # A save plan that was cached for the job's other checkpoints would not fit this one.
        context = {
            key: value for key, value in checkpointing_context.items() if key != "save_strategy"
        }
        committed = commit.commit(
            running,
            iteration,
            model,
            get_args(),
            step=lambda: step(context),
            save=lambda: save(context),
        )
        if committed.should_exit or running.config.exit_after_prune:
            events.log("exit_after_commit", iteration=iteration)
            return True
        writer = global_vars.get_tensorboard_writer()
        if writer:
            writer.close()
        running.close()
        handler = global_vars.get_signal_handler() if get_args().exit_signal_handler else None
        raise Rebuild(committed.expert_map.hash, release(model), handler)

    return checkpoint_and_decide_exit


def _update_router_expert_bias(original):
    return _by_length(original, "expert_bias")


def _update_router_qb_beta(original):
    return _by_length(original, "qb_beta")


def _by_length(original, vector: str):
    """Of an update of one vector per layer: Megatron stacks those of all layers.

    That needs one length. So layers of one length at a time, in the order of first appearance, the same
    on all ranks of a stage. Each call gets a stand-in for a model chunk: all that the function asks of
    one is modules().
    """

    def update(model, *more, **named):
        if not _pruned():
            return original(model, *more, **named)
        routers: dict[int, list[torch.nn.Module]] = {}
        for chunk in model:
            for module in chunk.modules():
                if getattr(module, vector, None) is not None:
                    routers.setdefault(getattr(module, vector).numel(), []).append(module)
        for same_length in routers.values():
            original([SimpleNamespace(modules=lambda found=same_length: found)], *more, **named)

    return update
