"""The main job: `torchrun --nproc_per_node N -m plrd_train experiment=NAME key=value …`. The same command continues a run that was stopped."""

import errno
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from plrd_train.compose import compose
from plrd_train.errors import UserError
from plrd_train.pipeline import make_family
from plrd_train.run import Run
from plrd_train.tracking import console
from plrd_train.world import SharedError, World


def main(arguments: Sequence[str]) -> int:
    """Make the families that the Hydra overrides `arguments` describe; the exit status is 0, or 2 for a user's mistake."""
    world = World.open()
    console.set_main(world.is_main)
    try:
        for source in world.on_main(lambda: compose(arguments)):
            _run(source, world)
    except SharedError as error:
        if world.is_main:
            _say_error(error)
        return 2
    except (UserError, OSError) as error:  # met by this rank alone: the launcher ends the others, which wait for it
        if isinstance(error, OSError) and error.errno != errno.ENOSPC:
            raise
        _say_error(error)
        sys.stdout.flush()
        os._exit(2)
    except RuntimeError as error:
        if world.size == 1 or "Connection" not in str(error):
            raise
        # Another rank has gone, and says why; this one only lost the connection to it. The launcher ends it.
        time.sleep(10)
        os._exit(1)
    world.close()
    return 0


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


def _say_error(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
