"""Figures as text, tables, the machine's description, and the place for a table in a document."""
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FLOORS = os.path.join(ROOT, "build", "perf", "floors")


def short(value):
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    if value >= 1e4:
        return f"{value / 1e3:.1f}k"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def spread(values):
    return f"{short(statistics.median(values))} ({short(min(values))}..{short(max(values))})"


def ratio_spread(values):
    return f"{statistics.median(values):.2f}x ({min(values):.2f}..{max(values):.2f})"


def text_table(lines, words):
    """`lines`: cells, the headings first. The first `words` columns are words, the others figures."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0])] + text[1:])


def markdown_table(lines, words):
    rule = "|" + "---|" * words + "--:|" * (len(lines[0]) - words)
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], rule] + text[1:])


def first_line(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        return (done.stdout or done.stderr).strip().splitlines()[0] if (done.stdout or done.stderr).strip() else ""
    except OSError:
        return ""


def describe_machine(args, programs):
    model = "?"
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": model, "cores": len(os.sched_getaffinity(0)), "kernel": os.uname().release,
        "system": next((line.split("=", 1)[1].strip().strip('"') for line in open("/etc/os-release", encoding="utf-8")
                        if line.startswith("PRETTY_NAME=")), "?"),
        "commit": first_line(["git", "describe", "--always", "--dirty", "--abbrev=10"]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rounds": args.rounds, "seconds": args.seconds,
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith("SDP_") and not k.startswith("SDP_VM_")} or "defaults",
        "programs": {program: first_line(command) for program, command in programs.items() if shutil.which(command[0])},
    }


def machine_line(machine):
    return (f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, Linux {machine['kernel']}; commit {machine['commit']}; "
            f"settings: {machine['settings']}.")


def floors():
    if not os.access(FLOORS, os.X_OK):
        return {}
    return json.loads(subprocess.run([FLOORS], capture_output=True, text=True, check=True).stdout)


def write_json(folder, name, content):
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as out:
        json.dump(content, out, indent=1)
    return path


def fill(document, mark, table):
    """Puts the table between the document's two marks."""
    path = os.path.join(ROOT, document)
    with open(path, encoding="utf-8") as source:
        text = source.read()
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        sys.exit(f"{document}: {begin} and {end} must be there once each")
    head, rest = text.split(begin)
    with open(path, "w", encoding="utf-8") as out:
        out.write(head + begin + "\n" + table + "\n" + end + rest.split(end)[1])
