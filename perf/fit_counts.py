"""Fits `lstm_triton.planning.cost.FITTED` to compiled kernels: what instructions a step spends on what a config has.

    python perf/fit_counts.py --sample 400 --seed 0

Compiles a random sample of what the planner may choose, counts in the binaries, and prints the table with the spread
of estimate / count. Needs no GPU.
"""

from __future__ import annotations

import argparse
import random
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
from compile_report import Job, Row, compile_job
from step_model import counts_of
from tqdm import tqdm

from lstm_triton.planning.cost import COUNTED_FROM, features
from lstm_triton.planning.device import KNOWN
from lstm_triton.planning.planner import admissible
from lstm_triton.planning.problem import PASSES, Problem

ARCHS = ("sm_80", "sm_90", "sm_90", "sm_100", "sm_120")  # twice what the goals are for
HIDDEN_SIZES = (32, 64, 128, 256, 384, 512, 650, 768, 1024, 1536, 2048)
BATCHES = (8, 64, 256)
TYPES = (("bfloat16", "tf32"), ("bfloat16", "tf32"), ("float32", "tf32"), ("float32", "tf32x3"))


def draw(draws: random.Random) -> Job:
    """A config that a plan may have; each block_b as likely as the others."""
    device, which, (dtype, precision) = KNOWN[draws.choice(ARCHS)], draws.choice(PASSES), draws.choice(TYPES)
    problem = Problem(which, draws.choice(HIDDEN_SIZES), draws.choice(BATCHES), 1, dtype, precision)
    configs = admissible(problem, device)
    block_b = draws.choice(sorted({config.block_b for config in configs}))
    return Job(problem, device, draws.choice([config for config in configs if config.block_b == block_b]), "plain")


def fit(rows: list[Row], which: str, count: str, names: tuple[str, ...]) -> tuple[dict[str, float], torch.Tensor]:
    """Coefficients >= 0 with the smallest relative errors, and estimate / count of each row."""
    chosen = [row for row in rows if row.job.problem.which == which and row.ok]
    jobs = [row.job for row in chosen]
    have = [features(job.config, job.problem, job.device) for job in jobs]
    counts = [counts_of(row.report.loop, row.job.config, row.job.problem) for row in chosen if row.report is not None]
    target = torch.tensor([max(getattr(one, count), 1.0) for one in counts], dtype=torch.float64)
    used = [name for name in names if any(one[name] for one in have)]
    while True:
        matrix = torch.tensor([[one[name] for name in used] for one in have], dtype=torch.float64)
        relative = matrix / target[:, None]
        solution = torch.linalg.lstsq(relative, torch.ones(len(have), 1, dtype=torch.float64)).solution[:, 0]
        if solution.min() >= 0:
            return dict(zip(used, solution.tolist())), matrix @ solution / target
        used.pop(int(solution.argmin()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=400, help="kernels to compile, about one a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.sample < 20:
        parser.error("a sample of less than 20 determines nothing")
    draws = random.Random(options.seed)
    jobs = [draw(draws) for _ in range(options.sample)]
    with ProcessPoolExecutor(options.workers) as pool:
        rows = list(tqdm(pool.map(compile_job, jobs), total=len(jobs), unit="kernel", disable=None))
    for row in rows:
        if not row.ok:
            print(row.line() + "  <-- not fit")
    for which in PASSES:
        for count, names in COUNTED_FROM.items():
            found, ratio = fit(rows, which, count, names)
            low, middle, high = (float(ratio.quantile(q)) for q in (0.1, 0.5, 0.9))
            print(f"{which} {count}: { ({name: round(value, 2) for name, value in found.items() if value >= 0.005}) }")
            print(f"    estimate / count {low:.2f} .. {middle:.2f} .. {high:.2f} (10%, 50%, 90% of {len(ratio)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
