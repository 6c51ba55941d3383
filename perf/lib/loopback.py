"""Kernel TCP against SDP over the loopback device."""
import os
import re
import shutil
import statistics
import subprocess
import sys

from lib import figures
from lib.programs import on_loopback
from lib.runs import Broken, Carrier, Sdp, run_once

HEADINGS = ["benchmark", "unit", "kernel TCP", "SDP", "ratio", "goal", "on lanes", "CPU s TCP / SDP"]


def summarise(name, benchmark, rounds):
    """One row a metric, from the rounds that have both runs."""
    rows = []
    for i, metric in enumerate(benchmark.metrics):
        tcp = [r["tcp"]["figures"][i] for r in rounds]
        sdp = [r["sdp"]["figures"][i] for r in rounds]
        ratios = [(s / t if metric.higher else t / s) for t, s in zip(tcp, sdp)]
        shares = [r["sdp"]["lane_share"] for r in rounds]
        reasons = {}
        for r in rounds:
            for reason, count in r["sdp"]["reasons"].items():
                reasons[reason] = reasons.get(reason, 0) + count

        def cpu(kind):
            return statistics.median(r[kind]["client_cpu_s"] + r[kind]["server_cpu_s"] for r in rounds)
        rows.append({"benchmark": name, "metric": metric.name, "unit": metric.unit, "higher_is_better": metric.higher, "goal": metric.goal,
                     "tcp": tcp, "sdp": sdp, "ratios": ratios, "ratio": statistics.median(ratios), "lane_share": min(shares),
                     "reasons": reasons, "expects_lanes": benchmark.expect_lanes, "cpu_tcp_s": cpu("tcp"), "cpu_sdp_s": cpu("sdp"),
                     "on_lanes": not benchmark.expect_lanes or min(shares) > 0.5})
    return rows


def cells(row):
    name = f"{row['benchmark']} {row['metric']}".strip()
    if not row["on_lanes"]:
        carrier = "NO: TCP"
    elif not row["expects_lanes"]:
        carrier = "by TCP"
    else:
        carrier = f"{row['lane_share']:.0%}"
    goal = f"{row['goal']}x" if row["goal"] else ""
    if row["goal"]:
        goal += " met" if row["ratio"] >= row["goal"] and row["on_lanes"] else " -"
    return [name, row["unit"], figures.spread(row["tcp"]), figures.spread(row["sdp"]), figures.ratio_spread(row["ratios"]), goal, carrier,
            f"{row['cpu_tcp_s']:.2f} / {row['cpu_sdp_s']:.2f}"]


def machine_lines(machine):
    lines = [figures.machine_line(machine),
             f"Medians (least..most) of {machine['rounds']} interleaved rounds of about {machine['seconds']} s; a ratio above 1 is better "
             "than TCP in the same round."]
    floors = machine["floors"]
    if floors:
        line = floors["line_round_trip_ns"]
        copies = ", ".join(f"{size} {rate:.1f}" for size, rate in floors["memcpy_gb_per_s"].items())
        ring = floors["two_copies_gb_per_s"]
        lines.append(f"Floors: a cache line's round trip between two cores {f'{line:.0f} ns' if line else 'n/a'}; memcpy GB/s: {copies}; "
                     f"into a ring on one core and out of it on another: {f'{ring:.1f} GB/s' if ring else 'n/a'}.")
    return lines


def markdown(rows, machine):
    return figures.markdown_table([HEADINGS] + [cells(row) for row in rows], 2) + "\n\n" + "  \n".join(machine_lines(machine))


def plot(rows, folder):
    """A bar a figure: the median ratio with its spread, on a logarithmic axis. Returns the files written."""
    if not shutil.which("gnuplot"):
        print("gnuplot is not installed: no plot", file=sys.stderr)
        return []
    data = os.path.join(folder, "compare.dat")
    with open(data, "w", encoding="utf-8") as out:
        for row in reversed(rows):
            name = f"{row['benchmark']} {row['metric']}".strip() + ("" if row["on_lanes"] else " (fell back to TCP)")
            out.write(f"\"{name}\" {row['ratio']:.4f} {min(row['ratios']):.4f} {max(row['ratios']):.4f}\n")
    top = max(max(row["ratios"]) for row in rows)
    low = min(min(row["ratios"]) for row in rows)
    script = f"""
set title "SDP : kernel TCP, loopback (median of rounds, least..most)"
set logscale x 2
set xrange [{min(0.5, low * 0.8)}:{top * 2.2}]
set yrange [-0.6:{len(rows) - 0.4}]
set format x "%gx"
set grid xtics lc rgb "#dddddd"
set ytics nomirror
set termoption noenhanced
set border 3
unset key
set arrow from 1, graph 0 to 1, graph 1 nohead lw 2 lc rgb "#888888" front
plot '{data}' using 2:0:(1 < $2 ? 1 : $2):(1 < $2 ? $2 : 1):($0-0.3):($0+0.3):ytic(1) with boxxyerrorbars fs solid 0.8 lc rgb "#2b6cb0", \\
     '' using 2:0:3:4 with xerrorbars pt 7 ps 0.4 lc rgb "#1a202c", \\
     '' using ($4*1.08):0:(sprintf("%.3gx", $2)) with labels left
"""
    files = []
    height = 120 + 34 * len(rows)
    for terminal, suffix in ((f"svg size 900,{height} font 'sans,12' background '#ffffff'", "svg"),
                             (f"pngcairo size 900,{height} font 'sans,11'", "png")):
        path = os.path.join(folder, "compare." + suffix)
        done = subprocess.run(["gnuplot"], input=f"set terminal {terminal}\nset output '{path}'\n{script}", text=True, capture_output=True,
                              check=False)
        if done.returncode or not os.path.exists(path):
            print(f"gnuplot: {done.stderr.strip()}", file=sys.stderr)
        else:
            files.append(path)
    os.remove(data)
    return files


def run_rounds(args, table):
    """Name -> the rounds that have both runs; name -> what went wrong."""
    carriers = {"tcp": Carrier(), "sdp": Carrier() if args.plain else Sdp(os.path.abspath(args.lib))}
    results = {name: [] for name in table}
    broken = {}
    for number in range(args.rounds):
        for name, benchmark in table.items():
            if sys.stderr.isatty():
                print(f"\r\033[Kround {number + 1}/{args.rounds}: {name}", end="", file=sys.stderr, flush=True)
            both = {}
            # Each round begins with the other one: whatever drifts hits both alike.
            for kind in (("tcp", "sdp") if number % 2 == 0 else ("sdp", "tcp")):
                try:
                    both[kind] = run_once(benchmark, carriers[kind], args.seconds)
                    if args.plain and kind == "sdp":
                        both[kind]["lane_share"] = 0.0
                except Broken as error:
                    broken.setdefault(name, []).append(f"round {number + 1}, {kind}: {error}")
            if len(both) == 2:
                results[name].append(both)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return results, broken


def compare(args):
    table, missing = on_loopback()
    table = {name: b for name, b in table.items() if re.search(args.only, name)}
    if missing:
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    if not table:
        sys.exit("nothing to run")
    machine = figures.describe_machine(args, {"netperf": ["netperf", "-V"], "sockperf": ["sockperf", "--version"],
                                              "redis": ["redis-server", "--version"]})
    machine["floors"] = figures.floors()
    print("\n".join(machine_lines(machine)), flush=True)
    results, broken = run_rounds(args, table)

    rows = [row for name, b in table.items() if results[name] for row in summarise(name, b, results[name])]
    print()
    if rows:
        print(markdown(rows, machine) if args.markdown else figures.text_table([HEADINGS] + [cells(row) for row in rows], 2))
    for row in rows:
        if not row["on_lanes"]:
            print(f"! {row['benchmark']} {row['metric']}: the SDP runs were not on lanes ({row['lane_share']:.0%}); reasons: {row['reasons']}")
    for name, errors in broken.items():
        for error in errors:
            print(f"! {name}: {error}")
    written = [figures.write_json(args.results, "compare.json", {"machine": machine, "rows": rows, "rounds": results, "broken": broken})]
    if rows:
        written += plot(rows, args.results)
    print("\nwritten: " + " ".join(os.path.relpath(path) for path in written))
    if args.readme:
        figures.fill("README.md", "compare", markdown(rows, machine))
    return 1 if broken or not rows else 0
