"""Measure the cost of distillation: time and memory of a training step, compared with student and teacher alone.

    d2kd benchmark --config-file RECIPE [--config-file …] [--variant NAME KEY=VALUE … [--variant …]]
                   [--image-size 800x1333 [--image-size …]] [--data STEPS] [--no-memory]
                   [--json FILE] [--markdown FILE] [--bound 1.05] [KEY=VALUE …]

RECIPE is a LazyConfig with a teacher. No weights are read, and no data without --data. All recipes, and each recipe
with the overrides of each variant, are measured alternately on the same batches. The exit code is 1 if, for any of
them, the lower end of the 95 % interval of distilled / (student + teacher) exceeds the bound.
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
        help="also measure each recipe with these overrides",
    )
    parser.add_argument(
        "--image-size",
        action="append",
        metavar="PIXELS",
        help="512, or height x width as in 800x1333, of the teacher's images if they are larger. "
        "Batches alternate between several sizes; 320 by default",
    )
    parser.add_argument("--batch-size", type=int, default=2, help="images per batch")
    parser.add_argument("--device", help="auto, cpu or cuda; the recipe's by default")
    parser.add_argument("--rounds", type=int, default=15, help="number of timings of each row")
    parser.add_argument(
        "--data",
        type=int,
        default=0,
        metavar="STEPS",
        help="also time the recipe's data loader, alone and in this many training steps, with its own image sizes",
    )
    parser.add_argument(
        "--no-memory",
        action="store_true",
        help="do not measure peak memory, which takes longer than a few rounds of timing",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write all results here; times are written as soon as they are measured",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here")
    parser.add_argument("--bound", type=float, help="maximum of the ratio, such as 1.05")
    parser.add_argument(
        "opts", nargs="*", help="overrides of each recipe, such as model.inherit=[]"
    )


def image_size(text: str) -> tuple[int, int]:
    """Parse "800x1333" or, for a square, "512" to (height, width).

    Raises:
        InputError: if the text is neither.
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise InputError("--image-size", text, "pixels such as 512, or 800x1333")
    return int(sides[0]), int(sides[-1])


def run(args: argparse.Namespace) -> None:
    from ..benchmark import MAIN_RATIO, BenchmarkCase, benchmark, format_costs
    from ..utils.io import write_json, write_text

    for option, path in (("--json", args.json), ("--markdown", args.markdown)):
        if path and path.is_dir():
            raise InputError(option, f"{path} is a folder", "a file")
    sizes = tuple(map(image_size, args.image_size or ["320"]))
    common = {"image_sizes": sizes, "batch_size": args.batch_size, "device": args.device}
    setups, variant_of = [], {}
    for config in args.config_file:
        label = Path(config).stem
        setups.append(BenchmarkCase(label, config, tuple(args.opts), **common))
        for name, *overrides in args.variant:
            variant_of[f"{label}, {name}"] = label
            setups.append(
                BenchmarkCase(f"{label}, {name}", config, (*args.opts, *overrides), **common)
            )

    def keep(result: dict) -> None:
        if args.json:
            write_json(args.json, result)
        if args.markdown:
            write_text(args.markdown, f"{format_costs(result, 'github')}\n")

    result = benchmark(
        setups,
        variant_of,
        args.rounds,
        data_steps=args.data,
        memory=not args.no_memory,
        on_result=keep,
    )
    print(f"\n{format_costs(result)}")
    if args.bound is None:
        return
    print()
    exceeded = False
    for ratio in result["ratios"]:
        if ratio["ratio"] == MAIN_RATIO:
            met = ratio["low"] <= args.bound
            exceeded = exceeded or not met
            verdict = "met" if met else "exceeded"
            print(
                f"{ratio['recipe']}, {MAIN_RATIO}: at least {ratio['low']:.3f}, "
                f"bound {args.bound} {verdict}"
            )
    if exceeded:
        raise SystemExit(1)
