"""The main job: `torchrun --nproc_per_node N -m plrd_train experiment=NAME key=value …`. The same command continues a run that was stopped."""

import errno
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from plrd_train.compose import compose
from plrd_train.config import from_mapping
from plrd_train.errors import UserError
from plrd_train.pipeline import make_family
from plrd_train.run import Run
from plrd_train.tracking import console
from plrd_train.world import SharedError, World

# What the system answers where it lets nobody write (or read): no room, no permission, a file where a folder should be.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def main(arguments: Sequence[str]) -> None:
    """Make the families that the Hydra overrides `arguments` describe. A user's mistake ends the process: status 2, one line on standard error."""
    world = World.open()
    console.set_main(world.is_main)
    try:
        for source in world.on_main(lambda: _composed(arguments)):
            try:
                _run(source, world)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                place = error.filename or source["run_dir"]
                raise UserError(f"{place}: {error.strerror}; mend that, and the same command goes on from where it was stopped") from None
    except UserError as error:
        # Met by this rank alone, or by all of them alike. The launcher ends ranks that wait for this one.
        if world.is_main or not isinstance(error, SharedError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        _end(2)
    except RuntimeError as error:
        if world.size == 1 or "Connection" not in str(error):
            raise
        time.sleep(10)  # another rank has gone, and says why; this one only lost the connection to it, and the launcher ends it
        _end(1)
    world.close()


def _composed(arguments: Sequence[str]) -> list[dict[str, Any]]:
    jobs = compose(arguments)
    for job in jobs:
        from_mapping(job)  # for what it raises: all points of a sweep are checked before the first begins
    return jobs


def _run(source: dict[str, Any], world: World) -> None:
    run = Run(source, world)
    try:
        family = make_family(run)
    except BaseException:
        run.close(exit_code=1)
        raise
    run.close()
    console.family_table(family.parent, family.members)
    console.say(f"{family.folder / 'report' / 'family.png'}")


def _end(status: int) -> NoReturn:
    """Leave at once: an orderly exit would wait in the process group for ranks that are gone."""
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
