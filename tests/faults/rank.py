"""One rank of a start under a real launcher: the plan of the fault as JSON, then the arguments of the main job."""

import json
import sys

from processes import main_job

from faults.striking import arm

if __name__ == "__main__":
    main_job(sys.argv[2:], arm, json.loads(sys.argv[1]))
