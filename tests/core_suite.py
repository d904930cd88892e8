"""What is run on every supported Megatron: the core suite, and its short form.

``conftest`` gives these tests the markers ``core`` and ``short``; ``scripts/test.sh --megatron VERSION``
runs the first, CI the second on the oldest supported version. A test belongs here if it would come out
otherwise where Megatron differs: whole jobs, and whatever asks Megatron for its own.
"""

CORE = (
    "tests/cpu/test_platform.py",
    "tests/loop/test_foreign_loop.py",
    "tests/loop/test_launcher.py",
    "tests/loop/test_resumption.py",
    "tests/mcore/test_arguments.py",
    "tests/mcore/test_optimizer_state.py",
    "tests/mcore/test_symbols.py",
    "tests/mcore/test_token_dispatcher.py",
    "tests/mcore/test_upstream_bugs.py",
    "tests/oracles/test_crashes.py",
    "tests/oracles/test_grouped_experts.py",
    "tests/oracles/test_hard_layouts.py",
    "tests/oracles/test_permutation.py",
    "tests/oracles/test_pruning_run.py",
    "tests/oracles/test_repaired_jobs.py",
    "tests/oracles/test_routing.py",
    "tests/oracles/test_uneven_experts.py",
    "tests/oracles/test_when.py",
)
"""Files, all their tests. A test that is ``long`` is run only where ``-m`` asks for it."""

SHORT = (
    "tests/oracles/test_permutation.py::test_permuted_equals_uninterrupted",
    "tests/oracles/test_pruning_run.py::test_it_prunes",
    "tests/oracles/test_pruning_run.py::test_pruned_equals_masked",
    "tests/oracles/test_crashes.py::test_the_same_command_goes_on",
    "tests/oracles/test_pruning_run.py::test_exit_after_prune_and_relaunch",
    "tests/oracles/test_uneven_experts.py::test_permuted",
    "tests/oracles/test_uneven_experts.py::test_pruned_equals_masked",
)
"""Tests, with all their parameters: permuted, pruned, killed, resumed, uneven."""
