"""`python -m benchmarks [NAME …]`: run the benchmarks, print a table, and write results.json."""

import importlib
import json
import pkgutil
import sys
from pathlib import Path

import benchmarks
from benchmarks import Row


def main(names: list[str]) -> None:
    known = sorted(
        module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_")
    )
    for name in names:
        if name not in known:
            sys.exit(f"there is no benchmark {name}; there are {', '.join(known)}")
    rows: list[Row] = []
    print(f"{'':44} {'shape':>24} {'ours':>10} {'other':>10} {'unit':8} {'ratio':>7}")
    for name in names or known:
        for row in importlib.import_module(f"benchmarks.{name}").rows():
            print(
                f"{row.name:44} {row.shape:>24} {row.ours:10.4g} {row.other:10.4g} {row.unit:8} {row.ratio:7.3g}",
                flush=True,
            )
            rows.append(row)
    target = Path(__file__).with_name("results.json")
    target.write_text(json.dumps([row.to_dict() for row in rows], indent=1) + "\n")
    print(
        f"{target}: {len(rows)} rows; device: {', '.join(sorted({row.device for row in rows}))}; a ratio above 1 is "
        "ours being better"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
