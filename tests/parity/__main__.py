"""``python -m tests.parity --method NAME FILE.npz``: exit 0 if all arrays agree, 1 if not, 2 on bad input."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from d2kd.utils.errors import InputError, report_input_errors

from . import (
    Arrays,
    Method,
    bckd,
    compare,
    crosskd,
    cwd,
    dist,
    dkd,
    fgd,
    gfl_erd,
    icd,
    ld,
    mgd,
    pgd,
    pkd,
    reviewkd,
)


def tolerance(method: str, array: str) -> tuple[float, float | None]:
    """The last arguments of :func:`compare` for an array, as README.md has them."""
    if method in ("erd", "gfl", "icd"):
        return 1e-4, 1e-7
    return (2e-5 if array.startswith("fcos/") else 1e-5), None


METHODS: dict[str, Method] = {
    "dist": dist.outputs,
    "dkd": dkd.outputs,
    "cwd": cwd.outputs,
    "bckd": bckd.outputs,
    "crosskd": crosskd.outputs,
    "erd": gfl_erd.erd_outputs,
    "fgd": fgd.outputs,
    "gfl": gfl_erd.outputs,
    "icd": icd.outputs,
    "mgd": mgd.outputs,
    "pkd": pkd.outputs,
    "reviewkd": reviewkd.outputs,
    "ld": ld.outputs,
    "pgd": pgd.outputs,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("file", metavar="FILE.npz")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    with report_input_errors(args.debug):
        arrays = Arrays(args.file)
        try:
            outputs = METHODS[args.method](arrays)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            found = f"its arrays do not fit together ({error})"
            raise InputError(args.file, found, "shapes as in README.md") from error
        rows = [
            (name, *compare(value, arrays[name], *tolerance(args.method, name)))
            for name, value in outputs.items()
        ]
    width = max(len("array"), *(len(name) for name, *_ in rows))
    print(f"{'array':{width}}  largest absolute and relative difference")
    for name, absolute, relative, agrees in rows:
        print(f"{name:{width}}  {absolute:9.2e}  {relative:9.2e}  {'ok' if agrees else 'OUT'}")
    return 0 if all(agrees for *_, agrees in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
