#!/usr/bin/env python3
"""What scripts/programs asks about the programs, and the table of its run.

  table.py --packages [PROGRAM...]   Debian packages of these modules in programs/, or of all
  table.py --cases [PROGRAM...]      their cases
  table.py --report FILE             the table of what run_app.py --report has written there, in Markdown
"""
import argparse
import collections
import json
import subprocess
import sys

import run_app


def version(package):
    found = subprocess.run(["dpkg-query", "-W", "-f=${source:Upstream-Version}", package], capture_output=True, text=True, check=False)
    return found.stdout or "not installed"


def show(path):
    with open(path, encoding="utf-8") as lines:
        results = [json.loads(line) for line in lines]
    print("| program | version | exercised | bytes by lane | result |\n|---|---|---|--:|---|")
    by_program = collections.defaultdict(list)
    for result in results:
        by_program[result["program"][0], result["program"][1]].append(result)
    for (name, package), cases in by_program.items():
        shown = f"{name} | {version(package)}"
        for case in cases:
            share = "" if case["share"] is None else f"{case['share']:.0%}"
            print(f"| {shown} | {case['what']} | {share} | {case['result']} |")
            shown = " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", action="store_true")
    parser.add_argument("--cases", action="store_true")
    parser.add_argument("--report", metavar="FILE")
    parser.add_argument("programs", nargs="*")
    args = parser.parse_args()
    if args.report:
        return show(args.report)
    for name in args.programs:
        if name not in run_app.MODULES:
            parser.error(f"no program {name}; there are {', '.join(run_app.MODULES)}")
    modules = [run_app.module(name) for name in args.programs or run_app.MODULES]
    if args.packages:
        print("\n".join(sorted({package for module in modules for package in module.PROGRAM[1:]})))
    if args.cases:
        print("\n".join(case.name for module in modules for case in module.CASES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
