"""LAEP in Megatron's training loop: the hooks, and the state machine that they drive.

One ``Job`` lives from the parsing of the arguments to the end of the training script, or to the
next pruning, whichever comes first. A pruning ends it with a ``Rebuild``; ``run`` then takes Megatron down
and runs the script again in the same process, where the next ``Job`` finds the pending map in the
checkpoint exactly as a relaunch after a crash would::

    arguments parsed -> Job.start     which checkpoint, which map, are the flags sound
    model built      -> set_layer_counts, if there is a map
    checkpoint load  -> Job.loading    through the map, if it is pending
    before iterations -> Job.begin     counters
    each iteration   -> Job.end_iteration; when it is time to prune Job.prune, then Rebuild

The loop itself is Megatron's; what is hooked, and why, is the list in ``_hooks``. Repairs of its
bugs, hooked only where a bug was shown, are those in ``upstream_bugs``.
"""

import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.training import get_args, global_vars
from megatron.training import training as megatron_training
from megatron.training.async_utils import maybe_finalize_async_save

from megatron_laep import config as laep_config
from megatron_laep import events, parallel, upstream_bugs
from megatron_laep.checkpoint import allow_pruned_checkpoints
from megatron_laep.config import LaepConfig
from megatron_laep.hooks import Hook, HookSet
from megatron_laep.job import Job, Rebuild
from megatron_laep.moe_layer import LaepMoELayer, set_layer_counts


class _Session:
    """What outlives a rebuild: the hooks and the settings. One for each process."""

    def __init__(self) -> None:
        self.hooks = HookSet()
        self.upstream = upstream_bugs.Findings()
        self.config: LaepConfig | None = None
        self.job: Job | None = None
        self.inside_run = False
        # The map that this process has just committed; the next start must find it.
        self.committed_hash: str | None = None


_session = _Session()


def install(config: LaepConfig | None = None) -> None:
    """Hooks LAEP into Megatron in this process, as ``python -m megatron_laep`` does.

    Call it before the training script parses its arguments and builds its layer specs, and run
    the training inside ``run``. While no ``--laep-*`` flag or config asks for pruning, and no pruned
    checkpoint is loaded, the hooks change nothing but what would end in an error of Megatron's
    (``upstream_bugs``: ``--help``, loading the state of fp32 parameters).

    Args:
        config: the settings; None takes them from the command line, where the ``--laep-*`` flags
            are added to Megatron's parser.

    Raises:
        RuntimeError: Megatron lacks a symbol that is hooked, or the hooks are installed already.
        ValueError: a setting is out of range.
    """
    if config is not None:
        config.validate()
    upstream = upstream_bugs.ask_megatron()
    _session.hooks.apply(_hooks() + upstream.hooks(lambda: _active_job() is not None))
    _session.upstream = upstream
    _session.config = config
    allow_pruned_checkpoints()
    events.show_on_console()


def uninstall() -> None:
    """Takes the hooks out again. Models that were built meanwhile keep their layers."""
    _session.hooks.undo()
    allow_pruned_checkpoints(False)
    _session.config = None
    _session.job = None


def run(main: Callable[[], Any]) -> Any:
    """Runs a training script's main function, and again after each pruning.

    Args:
        main: parses the arguments and calls ``megatron.training.pretrain``; everything that it
            needs it must make anew when it is called a second time.

    Returns:
        What ``main`` returned the last time.
    """
    _session.inside_run = True
    command_line = list(sys.argv)
    try:
        while True:
            sys.argv = list(command_line)
            try:
                return main()
            except Rebuild as rebuild:
                _session.committed_hash = rebuild.expert_map_hash
                old_model = rebuild.old_model
                _session.job = None
                # The frames of the loop hold the old model and its optimizer.
                traceback.clear_frames(rebuild.__traceback__)
                rebuild.__traceback__ = None
            with events.timed("tear_down"):
                parallel.tear_down()
            parallel.warn_if_alive(old_model)
    finally:
        _session.inside_run = False


def _hooks() -> list[Hook]:
    loop = "megatron.training.training"
    return [
        Hook(
            "megatron.training.arguments:add_megatron_arguments",
            _add_arguments,
            "show the --laep flags; scripts own their extra_args_provider",
        ),
        Hook(
            "megatron.training.arguments:parse_args",
            _parse_args,
            "refuse --laep flags that a YAML file would drop",
        ),
        Hook(
            "megatron.training.arguments:validate_args",
            _validate_args,
            "find the checkpoint's map before the groups and the model are built",
        ),
        Hook(
            "megatron.core.models.gpt.moe_module_specs:MoELayer",
            lambda original: LaepMoELayer,
            "put the counting layer into every GPT layer spec",
        ),
        Hook(
            "megatron.core.transformer.transformer_block:TransformerBlock._build_layers",
            _build_layers,
            "give each layer its own experts, whoever made the config",
        ),
        Hook(f"{loop}:load_checkpoint", _load_checkpoint, "load through the map"),
        Hook(
            "megatron.training.checkpointing:generate_state_dict",
            _generate_state_dict,
            "put the map into the checkpoint",
        ),
        Hook(
            "megatron.training.checkpointing:_build_sharded_state_dict_metadata",
            _build_metadata,
            "write the checkpoint with the map with one key for each layer",
        ),
        Hook(
            f"{loop}:setup_model_and_optimizer",
            _setup_model_and_optimizer,
            "agree on the map before the model is built, and start counting after",
        ),
        Hook(f"{loop}:training_log", _training_log, "log the loads at the log interval"),
        Hook(
            f"{loop}:report_theoretical_memory",
            _report_theoretical_memory,
            "not print a memory estimate that is wrong for uneven layers",
        ),
        Hook(
            f"{loop}:checkpoint_and_decide_exit",
            _checkpoint_and_decide_exit,
            "act at the end of an iteration, where Megatron saves",
        ),
        Hook(
            "megatron.core.distributed.finalize_model_grads:_update_router_expert_bias",
            _update_router_expert_bias,
            "update expert biases of layers with different expert counts",
        ),
    ]


def _add_arguments(original):
    def add_megatron_arguments(parser: ArgumentParser) -> ArgumentParser:
        parser = original(parser)
        upstream_bugs.mend_help(parser, _session.upstream)
        return laep_config.add_arguments(parser)

    return add_megatron_arguments


def _parse_args(original):
    def parse_args(*more, **named):
        args = original(*more, **named)
        given = [word for word in sys.argv[1:] if word.startswith("--laep-")]
        if args.yaml_cfg is not None and (given or _session.config is not None):
            raise ValueError(
                f"--yaml-cfg {args.yaml_cfg} replaces the command line, and with it "
                f"{given[0] if given else '--laep-prune-iteration'}; give all arguments as flags"
            )
        # A YAML job does not pass by validate_args, so it could not follow a pruned checkpoint's map.
        allow_pruned_checkpoints(args.yaml_cfg is None)
        return args

    return parse_args


def _validate_args(original):
    def validate_args(args: Namespace, *more, **named):
        if _session.config is not None:
            vars(args).update(_session.config.to_arguments())
        job = Job(LaepConfig.from_arguments(args))
        job.start(args, rebuilt_hash=_session.committed_hash, can_rebuild=_session.inside_run)
        result = original(args, *more, **named)
        job.check(args)
        if job.active:
            _session.upstream.check(args, prunes=job.prunes)
            events.log("upstream_repairs", **_session.upstream.fields)
        _session.job = job
        return result

    return validate_args


def _active_job() -> Job | None:
    """The job, if LAEP has anything to do in it."""
    return _session.job if _session.job is not None and _session.job.active else None


def _build_layers(original):
    def build_layers(self):
        job = _active_job()
        if job is not None and job.expert_map is not None:
            set_layer_counts(self.config, job.layout())
        return original(self)

    return build_layers


def _load_checkpoint(original):
    def load_checkpoint(ddp_model, optimizer, opt_param_scheduler, *more, **named):
        job = _active_job()
        if job is None:
            return original(ddp_model, optimizer, opt_param_scheduler, *more, **named)
        with job.loading(ddp_model, get_args()):
            result = original(ddp_model, optimizer, opt_param_scheduler, *more, **named)
        job.check_loaded(result[0])
        return result

    return load_checkpoint


def _generate_state_dict(original):
    def generate_state_dict(*more, iteration=None, **named):
        state_dict = original(*more, iteration=iteration, **named)
        job = _active_job()
        # Megatron builds the same dict when it loads; only a save has an iteration.
        if job is not None and iteration is not None:
            job.add_record(state_dict, iteration)
        return state_dict

    return generate_state_dict


def _build_metadata(original):
    def build_sharded_state_dict_metadata(*more, **named):
        metadata = original(*more, **named)
        job = _active_job()
        if job is not None and job.committing:
            metadata["non_homogeneous_layers"] = True
        return metadata

    return build_sharded_state_dict_metadata


def _setup_model_and_optimizer(original):
    def setup_model_and_optimizer(*more, **named):
        job = _active_job()
        if _session.job is None and _session.config is not None and _session.config.enabled:
            raise ValueError(
                "megatron_laep.install(config) asks for a pruning, but the script has not called "
                "megatron.training.arguments.parse_and_validate_args, where LAEP finds its "
                "checkpoint; parse the arguments with it"
            )
        if job is None:
            return original(*more, **named)
        job.agree()
        with events.timed("build", experts=job.expert_total(), map_state=job.map_state):
            result = original(*more, **named)
        job.begin(result[0], get_args())
        _session.committed_hash = None
        return result

    return setup_model_and_optimizer


def _training_log(original):
    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *more, **named):
        result = original(loss_dict, total_loss_dict, learning_rate, iteration, *more, **named)
        job = _active_job()
        if job is not None and iteration % get_args().log_interval == 0:
            job.log_loads(
                iteration,
                get_args(),
                tensorboard=global_vars.get_tensorboard_writer(),
                wandb=global_vars.get_wandb_writer(),
            )
        return result

    return training_log


def _report_theoretical_memory(original):
    def report_theoretical_memory(*more, **named):
        job = _active_job()
        if job is None or job.expert_map is None:
            return original(*more, **named)
        events.log(
            "theoretical_memory_skipped",
            reason="Megatron's estimate assumes one expert count for all layers",
        )

    return report_theoretical_memory


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
        job = _active_job()

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

        if job is None or not job.end_iteration(iteration):
            return step()

        # A save plan that was cached for the job's other checkpoints would not fit this one.
        context = {
            key: value for key, value in checkpointing_context.items() if key != "save_strategy"
        }
        maybe_finalize_async_save(blocking=True)
        should_exit = job.prune(
            iteration, model, get_args(), step=lambda: step(context), save=lambda: save(context)
        )
        if should_exit or job.config.exit_after_prune:
            events.log("exit_after_commit", iteration=iteration)
            return True
        writer = global_vars.get_tensorboard_writer()
        if writer:
            writer.close()
        job.end()
        raise Rebuild(job.lineage.last.hash, parallel.release(model))

    return checkpoint_and_decide_exit


def _update_router_expert_bias(original):
    def update_router_expert_bias(model, *more, **named):
        job = _active_job()
        if job is None or job.expert_map is None:
            return original(model, *more, **named)
        # Megatron stacks the vectors of all layers, which needs one length. Layers of one length
        # at a time, in the order of first appearance, the same on all ranks of a stage. Each call
        # gets a stand-in for a model chunk: all that the function asks of one is modules().
        routers: dict[int, list[torch.nn.Module]] = {}
        for chunk in model:
            for module in chunk.modules():
                if getattr(module, "expert_bias", None) is not None:
                    routers.setdefault(module.expert_bias.numel(), []).append(module)
        for same_length in routers.values():
            original([SimpleNamespace(modules=lambda found=same_length: found)], *more, **named)

    return update_router_expert_bias
