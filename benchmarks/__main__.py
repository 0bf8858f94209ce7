"""``python -m benchmarks``: run cases, or rewrite the documentation's tables.

``python -m benchmarks diagnose --help`` for how often the diagnosis is right;
``python -m benchmarks gpu`` for all that a GPU has to show, within minutes;
``python -m benchmarks kernels`` for the code that a compiler makes for one, without one;
``python -m benchmarks counts`` for how many operations on tensors each call is.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

CASES = ("overhead", "linear", "emulated", "memory", "head", "fp16_switch", "predicted",
         "threads", "newest", "monitor")


def main() -> None:
    if sys.argv[1:2] == ["diagnose"]:  # times nothing, so it has options of its own
        from benchmarks import diagnose

        sys.exit(diagnose.main(sys.argv[2:]))
    if sys.argv[1:2] == ["gpu"]:
        from benchmarks import gpu

        sys.exit(gpu.main(sys.argv[2:]))
    if sys.argv[1:] == ["kernels"]:
        from benchmarks import kernels

        sys.exit(kernels.main())
    if sys.argv[1:] == ["counts"]:  # neither timed nor recorded
        from benchmarks import counts

        sys.exit(counts.main())
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="+", choices=[*CASES, "report"], metavar="case",
                        help=f"one or more of {', '.join(CASES)}, report")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--small", action="store_true",
                        help="sizes of a few seconds, printed and not recorded")
    given = parser.parse_args()
    # before torch is imported: its thread pools are sized on loading
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    if "emulated" in given.cases:
        if len(given.cases) > 1 or given.device != "cpu":
            parser.error("emulated switches a CPU's 16-bit arithmetic off: run it by itself, there")
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"

    import torch

    from benchmarks import report
    from benchmarks.harness import Setting, record
    from benchmarks.screen import show

    torch.set_num_threads(given.threads)
    setting = Setting(given.device, given.threads, given.rounds, given.small)
    for case in given.cases:
        if case == "report":
            report.main()
            continue
        done = []
        for workload in importlib.import_module(f"benchmarks.{case}").run(setting):
            show(workload)
            done.append(workload)
            if not given.small:
                print(f"recorded in {record(case, done, setting)}", flush=True)


if __name__ == "__main__":
    main()
