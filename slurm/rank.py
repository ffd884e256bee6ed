"""Runs one of several processes that `srun` starts, with Slurm's rank and size under the names that torch reads.

srun python -m slurm.rank experiments.train RUN
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys


def torch_variables(slurm: dict[str, str]) -> dict[str, str]:
    """Return rank, size and rendezvous address of a step's processes, from the variables that srun sets for each."""
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        # srun runs on the job's first node, where rank 0 is.
        "MASTER_ADDR": slurm.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"),
        # Jobs that share a node need different ports; these are below Linux's range of outgoing ports.
        "MASTER_PORT": str(10000 + int(slurm["SLURM_JOB_ID"]) % 20000),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m slurm.rank", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("module", help="the module to run, e.g. experiments.train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    os.environ.update(torch_variables(dict(os.environ)))
    sys.argv = [options.module, *options.arguments]
    runpy.run_module(options.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
