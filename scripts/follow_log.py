"""Shows a training job's output as it comes, without what nobody reads: ... | python scripts/follow_log.py LOG

Appends every line to LOG. Passes on to the console: a short line for each of Megatron's iteration lines, losses on
validation data, checkpoints, what megatron_laep says (its table included), and errors.
"""

import re
import sys

ITERATION = re.compile(
    r"iteration +(?P<iteration>\d+)/ *(?P<last>\d+) \|.*elapsed time per iteration \(ms\): (?P<ms>[\d.]+)"
    r".*lm loss: (?P<loss>\S+) .*grad norm: (?P<norm>\S+)"
)
SHOWN = re.compile(
    r"laep event=(?!load |theoretical_memory)|validation loss|successfully saved|Error|error:|Traceback|^\[rank\d+\]:"
)
# The pruning table follows an empty log line of the package, up to its last total.
TABLE_START, TABLE_END = re.compile(r"^\[[^]]+\] $"), re.compile(r"^memory freed per rank")


def main(path: str) -> None:
    in_table = False
    with open(path, "a") as log:
        for line in sys.stdin:
            log.write(line)
            log.flush()
            found = ITERATION.search(line)
            if found:
                text = (
                    f"iteration {found['iteration']:>5}/{found['last']}   "
                    f"loss {float(found['loss']):.3f}   {float(found['ms']):.0f} ms"
                )
                print(text, flush=True)
            elif in_table or SHOWN.search(line):
                print(line, end="", flush=True)
            in_table = (in_table or bool(TABLE_START.match(line))) and not TABLE_END.match(line)


if __name__ == "__main__":
    main(sys.argv[1])
