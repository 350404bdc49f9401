"""`run_dir.py override…`: print the run_dir of the run that they describe, as that will have it."""

import sys

from plrd_train.config.sweep import points
from plrd_train.errors import UserError
from plrd_train.runtime.heartbeat import say


def main() -> None:
    try:
        jobs = points(sys.argv[1:])
        if len(jobs) != 1:
            raise UserError(f"these arguments describe {len(jobs)} runs; a sweep is for launch/slurm/array.sbatch")
    except UserError as error:
        say(str(error))
        sys.exit(2)
    print(jobs[0]["run_dir"])


if __name__ == "__main__":
    main()
