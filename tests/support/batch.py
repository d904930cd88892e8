"""Runs several training jobs one after the other in the same processes: python tests/support/batch.py JOBS.json SCRIPT.

Starting Python, torch and Megatron takes longer than a test's twenty iterations. Each rank runs this with the same
list of jobs; between two jobs Megatron is taken down as at a rebuild. A job with ``laep`` runs under
``megatron_laep.install()`` and ``run()``, the others on stock Megatron with the hooks taken out; one with a ``mask``
(a map's file) with the experts masked that the map drops.
"""

from __future__ import annotations

import json
import os
import runpy
import sys

from megatron_laep import cpu

if __name__ == "__main__":
    cpu.enable()
    import megatron_laep
    from megatron_laep.mcore import rebuild
    from tests.support.masked import mask_routers

    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    script = sys.argv[2]
    exact_log = os.environ["EXACT_LOG"]
    for number, job in enumerate(jobs):
        print(f"===== job {number} =====", flush=True)
        os.environ["EXACT_LOG"] = f"{exact_log}.{number}"
        sys.argv = [script, *job["args"]]
        if job["laep"]:
            megatron_laep.install()
        unmask = mask_routers(job["mask"]) if job["mask"] else None
        try:
            megatron_laep.run(lambda: runpy.run_path(script, run_name="__main__"))
        except SystemExit as exit_:
            if exit_.code:
                raise
        finally:
            megatron_laep.uninstall()
            if unmask:
                unmask()
        rebuild.tear_down()
