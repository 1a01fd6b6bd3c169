"""Time what this project does against what it cannot do without, and against other ways of doing it.

    python scripts/benchmark.py step                     # one benchmark; `--help` lists them
    python scripts/benchmark.py step --quick             # the same with few and short runs: does it work?
    python scripts/benchmark.py step --json step.json    # keep the numbers, with versions and machine
    python scripts/benchmark.py all                      # every benchmark, numbers to benchmarks/*.json
    python scripts/benchmark.py report                   # docs/performance.md and its plots from benchmarks/*.json

All sides of a comparison run in turn in one process, because a machine's speed drifts; what counts is the median of the
ratios of neighbours, with its quartiles. Absolute times are of one machine on one day.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench import BENCHMARKS

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def main() -> None:
    """Run benchmarks, print their tables and keep their numbers."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n" + "\n".join(f"  {name:15}{what}" for name, what in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "all", "report"], metavar="benchmark")
    parser.add_argument("--quick", action="store_true", help="few and short runs")
    parser.add_argument("--json", type=Path, help="file for the numbers of one benchmark")
    arguments = parser.parse_args()
    if arguments.benchmark == "report":
        importlib.import_module("bench.report").write(FOLDER, FOLDER.parent / "docs")
        return
    if arguments.benchmark == "all" and arguments.json:
        parser.error("--json names the file of one benchmark; all of them go to benchmarks/*.json.")
    if arguments.benchmark == "all":
        run_all(arguments.quick)
    else:
        run(arguments.benchmark, arguments.quick, arguments.json)


def run_all(quick: bool) -> None:
    """Run every benchmark in a process of its own, because what some of them set cannot be undone."""
    import torch

    for name in BENCHMARKS:
        if name == "gpu" and not torch.cuda.is_available():
            print("gpu: left out, because torch finds no GPU here.", flush=True)
            continue
        options = ["--quick"] if quick else ["--json", str(FOLDER / f"{name}.json")]
        subprocess.run([sys.executable, __file__, name, *options], check=True)


def run(name: str, quick: bool, path: Path | None) -> dict[str, Any]:
    """Run one benchmark, print its tables, and write its numbers to ``path``."""
    import torch  # here, so that --help and a wrong name answer at once
    from bench.markdown import flat_tables
    from bench.timing import table

    from mm_lightning.command.run_folder import environment
    from mm_lightning.command.train import quieten
    from mm_lightning.files import write_json

    quieten()
    result = importlib.import_module(f"bench.{name}").measure(quick)
    tables = [table(result["rows"])] if result["rows"] else []
    tables += flat_tables({key: value for key, value in result.items() if key != "rows"})
    print(f"\n## {name}: {BENCHMARKS[name]}", *tables, *result.get("notes", []), sep="\n\n", flush=True)
    content = {
        "benchmark": name,
        "what": BENCHMARKS[name],
        "command": f"python scripts/benchmark.py {name}{' --quick' * quick}",
        **result,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        **environment(),
    }
    if path:
        write_json(path, content)
    return content


def processor() -> str:
    """The processor's name and the widest instructions that PyTorch uses on it."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
