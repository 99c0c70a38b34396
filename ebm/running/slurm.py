"""What becomes of a Slurm job of a sweep whose process ended badly. The batch script (conf/hydra/launcher/slurm.yaml)
calls it:  python -m ebm.running.slurm EXIT_CODE MAX_RESTARTS SUBMITIT_FOLDER

A job that its warning (SIGUSR2) ended before submitit listened, while it imported, goes back into the queue. Of any
other that is not there already submitit finds the result None, for without Slurm's accounting it would wait for ever.
"""

import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import submitit
from submitit.core.utils import cloudpickle_dump, temporary_save_path


def end(code: int, max_restarts: int, folder: str) -> None:
    os.environ["SUBMITIT_FOLDER"] = folder
    job = submitit.JobEnvironment()
    show = ["scontrol", "show", "job", "--oneliner", job.job_id]
    shown = re.search(r" Restarts=(\d+)", subprocess.run(show, capture_output=True, text=True, check=True).stdout)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if shown and int(shown[1]) > restarts:
        return  # submitit or Slurm has put it back
    if code == 128 + signal.SIGUSR2 and restarts < max_restarts:
        subprocess.run(["scontrol", "requeue", job.job_id], check=True)
    elif not job.paths.result_pickle.exists():
        with temporary_save_path(job.paths.result_pickle) as file:
            cloudpickle_dump(("success", SimpleNamespace(return_value=None)), file)


if __name__ == "__main__":
    end(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    sys.exit(int(sys.argv[1]))
