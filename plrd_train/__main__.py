"""The main job: `torchrun --nproc_per_node N -m plrd_train experiment=NAME key=value …`. The same command continues a
run that was stopped."""

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plrd_train.config import sweep
from plrd_train.errors import UserError
from plrd_train.pipeline import make_family
from plrd_train.publish.continuations import continuations
from plrd_train.run import Run
from plrd_train.runtime.heartbeat import say
from plrd_train.runtime.heartbeat.link import my_name
from plrd_train.runtime.lock import locked
from plrd_train.runtime.place import Place
from plrd_train.runtime.stop import STATUS, Stopped, StopRequest
from plrd_train.runtime.world import SharedError, World
from plrd_train.tracking import console

# What the system answers where it lets nobody write (or read): no room, no permission, a file where a folder should be,
# a disk that fails.
_REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    errno.EIO,
}


def main(arguments: Sequence[str]) -> None:
    """Make the families that the Hydra overrides `arguments` describe.

    Ends the process with one status on all ranks: 2 after a user's mistake and 75 after a request to stop, with one
    line, and 1 after anything else.
    """
    if sweep.is_for_jobs(arguments):
        sys.exit(sweep.submit(arguments))
    request = StopRequest()
    world = _open_world()
    console.set_main(world.is_main)
    try:
        for source in world.on_main(lambda: sweep.points(arguments)):
            try:
                _run(source, world, request)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                place = error.filename or source["run_dir"]
                raise UserError(
                    f"{place}: {error.strerror}; mend that, and the same command goes on from where it was stopped"
                ) from None
    except SharedError as error:
        if world.is_main:
            say(str(error))
        world.heartbeat.close()
        world.heartbeat.leave(2)
    except UserError as error:
        if world.heartbeat.first_to_fail(2, own=True):
            say(str(error))
        world.heartbeat.leave(2)
    except Stopped as stopped:
        console.say(f"stopped as asked, {stopped}; the same command goes on from there")
        if world.is_main:
            request.done()
        world.close()
        sys.exit(STATUS)
    except Exception:  # a defect, or what a collective raises where another rank is lost
        if world.heartbeat.first_to_fail(1, own=False):
            traceback.print_exc()
            if world.size > 1:
                say(f"rank {world.rank} ({my_name()}) failed by the exception above")
        world.heartbeat.leave(1)
    world.close()


def _open_world() -> World:
    place = Place()
    try:
        place = Place.read()
        return World.open(place)
    except UserError as error:
        if place.rank == 0 or not isinstance(error, SharedError):
            say(str(error))
        os._exit(2)


def _run(source: dict[str, Any], world: World, request: StopRequest) -> None:
    with locked(Path(source["run_dir"]), world):
        run = Run(source, world, request)
        try:
            family = make_family(run)
        except BaseException:
            run.close(exit_code=1)
            raise
        run.close()
        settings = run.config
        written: list[tuple[str, str]] = []
        if (prompt := settings.evaluation.prompt) is not None:
            remote_code = settings.parent.trust_remote_code
            written = world.on_main(lambda: list(continuations(family, prompt, trust_remote_code=remote_code)))
    console.family_table(family)
    if written:
        console.say(f"after {settings.evaluation.prompt!r}:")
        width = max(len(name) for name, _ in written)
        for name, text in written:
            console.say(f"  {name:<{width}}  {text!r}")
    console.say(f"{family.folder / 'report' / 'family.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
