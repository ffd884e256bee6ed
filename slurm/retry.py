"""Submits the failed runs again, and only these, with the arguments of `slurm.submit`.

    python -m slurm.retry --failed experiment=quickstart cluster=mycluster

`slurm.submit` itself submits everything that is missing, including failed runs.
"""

from __future__ import annotations

from experiments.errors import UserError, run_command
from slurm.submit import parse, submit_from


def main(arguments: list[str]) -> None:
    options = parse(arguments, "slurm.retry", __doc__, failed=True)
    if not options.failed:
        raise UserError("give --failed; to submit all that is missing, use slurm.submit")
    submit_from(options, only_failed=True)


if __name__ == "__main__":
    run_command(main)
