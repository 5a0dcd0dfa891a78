"""Tables of PERFORMANCE.md and README.md, generated from the files that `bench train` and `bench infer --json` write.

`python -m vit_static.bench.tables` rewrites both pages. A table is between `<!-- bench NAME -->` and `<!-- end -->`;
NAME is that of a file in configs/benchmarks/, without `.json`, or `summary` for the ratios of all files. In place of a
file that doesn't exist stands "not run", with its command.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_static.bench.harness import ROOT, machine_line, target_text
from vit_static.common.text import print_text

FOLDER = Path("configs") / "benchmarks"
PAGES = (Path("configs") / "PERFORMANCE.md", Path("README.md"))
SUMMARY = "summary"
_BLOCK = re.compile(r"(<!-- bench (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
# The files that the pages show, and the arguments that measure each
COMMANDS = {
    # Four images of B/16 in a step, which 16 make half a minute long on two cores
    f"{bench}_{model}_{cpu}": f"bench {bench}{arguments}"
    f"{' -o data.global_batch_size=4' if (bench, model) == ('train', 'b16') else ''} --rounds 5 --seconds {seconds}"
    for bench, seconds in (("train", 8), ("infer", 3))
    for model, arguments in (("s16", ""), ("b16", " -o model.variant=B/16"))
    for cpu in ("avx2", "avx512")
}


def main(arguments: Sequence[str]) -> int:
    """Rewrite the pages below a folder, by default this source tree; return the exit code."""
    root = Path(arguments[0]) if arguments else ROOT
    for page in PAGES:
        text = (root / page).read_text(encoding="utf-8")
        (root / page).write_text(with_tables(text, root), encoding="utf-8")
        print_text(f"{page}: written")
    return 0


def with_tables(text: str, root: Path) -> str:
    """Return a page with its tables generated again. Raises ValueError for a table that COMMANDS doesn't name."""
    return _BLOCK.sub(lambda match: f"{match[1]}{block(match[2], root)}{match[3]}", text)


def block(name: str, root: Path) -> str:
    """Return the text between the marks of a table, with its last line end."""
    if name == SUMMARY:
        return summary({stem: read(root, stem) for stem in COMMANDS})
    if name not in COMMANDS:
        raise ValueError(f"<!-- bench {name} -->: unknown table; there are {', '.join((*COMMANDS, SUMMARY))}")
    results = read(root, name)
    if results is None:
        return f"Not run: `{command(name)}`.\n"
    lines = [
        f"{results['model']} on {machine_line(results['machine'])}: `{command(name)}`.",
        "",
        *candidate_table(results),
        "",
        *ratio_table(results),
    ]
    missing = [f"{title}: not installed" for title in results["missing"]]
    return "\n".join([*lines, *(["", "; ".join(missing) + "."] if missing else [])]) + "\n"


def command(name: str) -> str:
    """Return the command that measures a table."""
    return f"./run.sh {COMMANDS[name]} --json {FOLDER / name}.json"


def read(root: Path, name: str) -> dict[str, Any] | None:
    """Return the results of a file, or None if it doesn't exist."""
    path = root / FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def candidate_table(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of a Markdown table with a row per candidate."""
    candidates = results["candidates"].values()
    has_latencies = any("p50_ms" in candidate for candidate in candidates) and results["bench"] == "infer"
    heads = ["", "images/s", "least", "most", *(["p50", "p99"] if has_latencies else []), "peak memory"]
    rows = []
    for candidate in candidates:
        speeds = candidate["images_per_s"]
        latencies = [f"{candidate[f'p{n}_ms']:.1f} ms" for n in (50, 99) if has_latencies]
        rows.append(
            [
                f"{candidate['title'].rstrip(',')} {candidate['version']}".strip(),
                *(f"{value:.2f}" for value in (statistics.median(speeds), min(speeds), max(speeds))),
                *latencies,
                f"{candidate['peak_bytes'] / 1e6:.0f} MB",
            ]
        )
    return markdown(heads, rows)


def ratio_table(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of a Markdown table with a row per ratio, beside its target."""
    targets = results["targets"]
    rows = [
        [name, f"{value:.2f}", target_text(name, targets[name]).replace("<=", "≤").replace(">=", "≥")]
        if name in targets
        else [name, f"{value:.2f}", ""]
        for name, value in results["ratios"].items()
    ]
    return markdown(["ratio, ours over theirs", "measured", "target"], rows)


def summary(files: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Return a table with the ratios that have targets, a row per file."""
    rows = []
    for results in files.values():
        if results is None:
            continue
        names = results["targets"]
        ratios = ", ".join(
            f"{ratio_name.replace('_', ' ')} {results['ratios'][ratio_name]:.2f}" for ratio_name in names
        )
        bench = {"train": "training", "infer": "inference"}[results["bench"]]
        rows.append([f"{results['model']}, {bench}", machine_line(results["machine"]), ratios])
    if not rows:
        return "Not run.\n"
    return "\n".join(markdown(["", "CPU", "ours over the best peer's"], rows, right=())) + "\n"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] | None = None) -> list[str]:
    """Return the lines of a Markdown table; the columns `right` are aligned to the right, by default all but one."""
    aligned = range(1, len(heads)) if right is None else right
    marks = ["--:" if index in aligned else "---" for index in range(len(heads))]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, marks, *rows)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
