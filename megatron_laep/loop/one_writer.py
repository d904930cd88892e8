"""One start of a job writes to its folder: the one that began last. The others stop before their next save.

Nobody can know whether the ranks of an earlier start are still alive. So a start makes the folder its
own when its model is loaded, and every start looks whether it still is before it writes a checkpoint.
"""

from pathlib import Path

from megatron_laep import events
from megatron_laep.checks import Refusal
from megatron_laep.events import on_rank_0
from megatron_laep.records import job_writer
from megatron_laep.records.job_writer import JobWriter

COMPLETE = "metadata.json"
"""What Megatron writes last of a distributed checkpoint, and looks for first."""


class OneWriter:
    """The claim of this process on a folder; made on all ranks, held by rank 0.

    Args:
        folder: ``<save>/laep``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mine = JobWriter.of_this_process()
        if not events.is_rank_0():
            return
        with events.failure_is_logged(file=folder / job_writer.NAME):
            before = job_writer.read(folder)
            job_writer.write(folder, self._mine)
            if before is not None:
                events.log("folder_taken", folder=folder.parent, before=before)

    def before_save(self, iteration: int, checkpoint: Path | None) -> None:
        """Before a checkpoint is written: is the folder still ours. A collective.

        Args:
            checkpoint: its folder, if that is known. What marks the one of an earlier attempt there as
                complete is taken away first: half of each would be taken for a whole.

        Raises:
            Refusal: on all ranks, if another start has taken the folder.
        """

        def on_first() -> None:
            self._check(iteration)
            if checkpoint is not None:
                with events.failure_is_logged(checkpoint=checkpoint):
                    (checkpoint / COMPLETE).unlink(missing_ok=True)

        on_rank_0(on_first)

    def _check(self, iteration: int) -> None:
        # A disk that fails is no other start.
        with events.failure_is_logged(file=self.folder / job_writer.NAME):
            now = job_writer.read(self.folder)
            if now is None:
                job_writer.write(self.folder, self._mine)
            elif now.start != self._mine.start:
                raise Refusal(
                    f"{self.folder.parent}: the same folder is being written by {now}, which began after "
                    f"this job ({self._mine}). This one stops at iteration {iteration} and has written "
                    "nothing since. If it was meant to go on, end the other one, and start it again; two "
                    "jobs need two --save folders"
                )
