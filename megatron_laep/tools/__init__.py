"""The command line of the offline tools: ``python -m megatron_laep.tools`` or ``laep``.

Reads what a job recorded or wrote, changes nothing there. A subcommand is a module of this folder
that ``__main__`` lists, with one function::

    def add_parser(subparsers) -> None:
        parser = subparsers.add_parser("name", help="one line", description="more")
        parser.add_argument(...)
        parser.set_defaults(run=run)      # run(args: argparse.Namespace) -> int, the exit code

``run`` prints its product to stdout and raises ``ValueError`` with a sentence for everything that
is wrong with its input; ``__main__`` turns that into a line on stderr and exit code 2. The modules
must load without torch and Megatron, and quickly: what only one subcommand needs and takes long to
import is imported in its ``run``. ``options`` has what several subcommands share.
"""
