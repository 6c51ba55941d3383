#!/usr/bin/env python3
"""Fails unless the library exports exactly what preload/exports.map lists: exports.py [--nm NM] LIBRARY MAP.

One name too many is a symbol that may take the place of a program's own; one too few is a call that slips past us.
"""
import argparse
import re
import subprocess
import sys


def listed(text):
    """The names in the map's global: sections. Wildcards are refused there: they would let anything through."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*|#[^\n]*", "", text, flags=re.S)
    names = set()
    for body in re.findall(r"\{(.*?)\}", text, flags=re.S):
        section = "global"
        for item in re.split(r"[;\s]+", body.replace(":", ": ")):
            if item in ("global:", "local:"):
                section = item[:-1]
            elif item and section == "global":
                if "*" in item or "?" in item:
                    sys.exit(f"exports.map: wildcard {item} among the exported names")
                names.add(item)
    return names


def exported(nm, library):
    output = subprocess.run([nm, "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    symbols = (line.split() for line in output.splitlines())
    # Version nodes themselves show as absolute symbols (A).
    return {s[-1].split("@")[0] for s in symbols if len(s) >= 2 and s[-2] != "A"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nm", default="nm")
    parser.add_argument("library")
    parser.add_argument("map")
    args = parser.parse_args()
    assert listed("V { global: a; b; /* c; */ local: *; };") == {"a", "b"}
    with open(args.map, encoding="utf-8") as source:
        wanted = listed(source.read())
    have = exported(args.nm, args.library)
    for name in sorted(have - wanted):
        print(f"exported but not listed: {name}", file=sys.stderr)
    for name in sorted(wanted - have):
        print(f"listed but not exported: {name}", file=sys.stderr)
    print(f"exports: {len(have)} symbols")
    return 0 if have == wanted and have else 1


sys.exit(main())
