"""Submit again the runs that failed, and only these, with the arguments of `slurm.submit`.

    python -m slurm.retry --failed experiment=quickstart cluster=mycluster

`slurm.submit` itself takes up everything that is missing, failed runs among it.
"""

from __future__ import annotations

from experiments.errors import UserError, run_command
from slurm.submit import parse, submit_from


def main(arguments: list[str]) -> None:
    options = parse(arguments, "slurm.retry", __doc__, failed=True)
    if not options.failed:
        raise UserError("say what to retry: --failed; all that is missing is submitted by slurm.submit")
    submit_from(options, only_failed=True)


if __name__ == "__main__":
    run_command(main)
