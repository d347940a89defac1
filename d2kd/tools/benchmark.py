"""Measure what distillation costs: seconds and memory of a step, beside the student's and the teacher's part.

    d2kd benchmark --config-file RECIPE [--config-file …] [--variant NAME KEY=VALUE … [--variant …]]
                   [--image-size 800x1333 [--image-size …]] [--data STEPS] [--no-memory]
                   [--json FILE] [--markdown FILE] [--bound 1.05] [KEY=VALUE …]

RECIPE is a LazyConfig with a teacher; neither weights nor, without --data, data are read. Several are measured in
turn on the same batches, and so is each with the overrides of every variant. A bound is met if, for each, the lower
end of the 95 % interval of distilled / (student + teacher) is not above it; otherwise the exit code is 1.
"""

import argparse
from pathlib import Path

from ..utils.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-file", required=True, action="append", help="a distilled LazyConfig recipe"
    )
    parser.add_argument(
        "--variant",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="each recipe once more, with these overrides",
    )
    parser.add_argument(
        "--image-size",
        action="append",
        metavar="PIXELS",
        help="512, or height x width as in 800x1333; the teacher's where it sees larger ones. "
        "Several are taken in turn by the batches; 320 by default",
    )
    parser.add_argument("--batch-size", type=int, default=2, help="images in a batch")
    parser.add_argument("--device", help="instead of the recipe's: auto, cpu or cuda")
    parser.add_argument("--rounds", type=int, default=15, help="how often each row is timed")
    parser.add_argument(
        "--data",
        type=int,
        default=0,
        metavar="STEPS",
        help="also read the recipe's training data, in its own sizes: its loader alone, then feeding so many steps",
    )
    parser.add_argument(
        "--no-memory",
        action="store_true",
        help="leave out the peaks of memory, which take longer than a few rounds of time",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where to write all figures; the times as soon as they are known",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="where to write the tables")
    parser.add_argument("--bound", type=float, help="what the ratio shall not exceed, such as 1.05")
    parser.add_argument(
        "opts", nargs="*", help="overrides of each recipe, such as model.inherit=[]"
    )


def image_size(text: str) -> tuple[int, int]:
    """(height, width), of "800x1333" or, for a square, of "512".

    Raises:
        InputError: the text is neither.
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise InputError("--image-size", text, "pixels such as 512, or 800x1333")
    return int(sides[0]), int(sides[-1])


def run(args: argparse.Namespace) -> None:
    from ..benchmark import HEADLINE, Setup, benchmark, table
    from ..utils.io import write_json, write_text

    for option, path in (("--json", args.json), ("--markdown", args.markdown)):
        if path and path.is_dir():
            raise InputError(option, f"{path} is a folder", "a file")
    sizes = tuple(map(image_size, args.image_size or ["320"]))
    common = {"image_sizes": sizes, "batch_size": args.batch_size, "device": args.device}
    setups, variant_of = [], {}
    for config in args.config_file:
        label = Path(config).stem
        setups.append(Setup(label, config, tuple(args.opts), **common))
        for name, *overrides in args.variant:
            variant_of[f"{label}, {name}"] = label
            setups.append(Setup(f"{label}, {name}", config, (*args.opts, *overrides), **common))

    def keep(result: dict) -> None:
        if args.json:
            write_json(args.json, result)
        if args.markdown:
            write_text(args.markdown, f"{table(result, 'github')}\n")

    result = benchmark(
        setups,
        variant_of,
        args.rounds,
        data_steps=args.data,
        memory=not args.no_memory,
        keep=keep,
    )
    print(f"\n{table(result)}")
    if args.bound is None:
        return
    print()
    exceeded = False
    for ratio in result["ratios"]:
        if ratio["ratio"] == HEADLINE:
            met = ratio["low"] <= args.bound
            exceeded = exceeded or not met
            verdict = "met" if met else "exceeded"
            print(
                f"{ratio['recipe']}, {HEADLINE}: at least {ratio['low']:.3f}, "
                f"bound {args.bound} {verdict}"
            )
    if exceeded:
        raise SystemExit(1)
