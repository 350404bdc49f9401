"""`python -m plrd_train.torchrun …`: torchrun, which ends with the exit status of the rank that failed first and without a report of its own.

Where a rank has said in one line what the user must mend, torchrun's traceback under it would bury that line.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(arguments: list[str]) -> int:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # a signal, as shells report it
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
