"""The job that follows an experiment's arrays: it plans the second stage, or writes the report.

So an experiment that chooses its learning rates needs nobody logged in between its stages. An experiment has one such
job at a time; it waits for all of the experiment's jobs, and submitting again replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slurm.arrays import Options, job_script, sbatch, submission_folder
from slurm.cluster import Cluster
from slurm.manifest import submissions
from slurm.queue import cancel, slurm


def submit_follow_up(
    name: str,
    overrides: Sequence[str],
    runs_dir: Path,
    code: dict[str, Any],
    cluster: Cluster,
    options: Options,
    flags: Sequence[str],
    after: Sequence[str],
    second_stage: bool,
) -> str:
    """Submit the job after the jobs `after`, replacing one that still waits, and return its id.

    Args:
        flags: --paper, --budget and its speeds, as given.
    """
    comment = f"{submissions(runs_dir)}/follow-up of {name}"
    cancel(_waiting(comment))
    if second_stage:
        command = [
            "slurm.submit",
            f"experiment={name}",
            *overrides,
            *cluster.given,
            *flags,
            "--second-stage",
            f"--pack={options.pack}",
        ]
        command += [f"--max-parallel={options.max_parallel}"] if options.max_parallel else []
        command += ["--eval-separately"] if options.eval_separately else []
    else:
        # Without the budget: it may count time limits of the cluster, and runs it excluded have nothing to report.
        paper = [flag for flag in flags if flag == "--paper"]
        command = ["experiments.reproduce", name, *overrides, *paper, "--report-only"]
    folder = submission_folder(runs_dir)
    # A job that submits jobs must not pass its own size on to them.
    forget = 'for name in "${!SLURM_@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done'
    script = job_script(cluster, cluster.follow_up_resources(), code, command, before=[forget])
    (folder / "job.sh").write_text(script, encoding="utf-8")
    dependency = f"afterany:{':'.join(after)}" if after else ""
    return sbatch(folder, name, cluster, [f"--comment={comment}", f"--output={folder}/follow_up.log"], dependency)


def _waiting(comment: str) -> list[str]:
    listing = slurm("squeue", "--noheader", "--me", "--states=PENDING", "--format=%A|%k")
    jobs = (line.partition("|") for line in listing.splitlines())
    return [job for job, _, said in jobs if said == comment]
