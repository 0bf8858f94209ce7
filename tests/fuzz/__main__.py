"""Try an area's random cases for so many seconds and print how many failed.

A case that fails is shrunk and written to tests/cases; tests/test_fuzz.py replays it from then on.
"""

import argparse
import importlib

AREAS = ("loss", "blocks", "fused", "ranks", "dumps", "convert", "report", "cli")


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="for all areas together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--area", choices=AREAS, action="append", help="more than one will do")
    given = parser.parse_args()
    areas, failures = given.area or AREAS, 0
    for area in areas:
        run = importlib.import_module(f"tests.fuzz.{area}").run
        counts = run(given.seed, given.seconds / len(areas))
        failures += counts["failures"]
        print(f"{area:8}", ", ".join(f"{n} {what}" for what, n in counts.items()), flush=True)
    return failures > 0


if __name__ == "__main__":
    raise SystemExit(main())
