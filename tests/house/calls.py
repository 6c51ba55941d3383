#!/usr/bin/env python3
"""Fails unless preload/CALLS.md is complete: calls.py --cc CC CALLS.md EXPORTS.map.

Complete: every function of libc's headers that takes a descriptor is in one of its tables, and those that are there as interposed are
just the exported ones.
"""
import argparse
import re
import subprocess
import sys

HEADERS = """aio arpa/inet dirent fcntl netdb poll pty spawn stdio stdlib sys/epoll sys/eventfd sys/fanotify sys/file sys/inotify sys/ioctl
sys/mman sys/pidfd sys/select sys/sendfile sys/signalfd sys/socket sys/stat sys/statfs sys/statvfs sys/timerfd sys/uio sys/xattr termios
unistd utmp""".split()
DESCRIPTOR = re.compile(r"\bint\s+(?:__)?(?:fd|fildes|filedes|sockfd|[a-z]*fd[0-9]?|fd[a-z]+|fd_in|fd_out|[a-z]+_fd|socket|sd)\s*(?=[,)])")


def takes_descriptor(preprocessed):
    """The functions that the text declares with a descriptor among their parameters."""
    names = set()
    for statement in preprocessed.split(";"):
        head = re.match(r"(?:.*[{}])?\s*extern\b[^()]*?\b([A-Za-z_]\w*)\s*\((.*)\)", re.sub(r"\s+", " ", statement), flags=re.S)
        if head and DESCRIPTOR.search(head.group(2) + ")"):
            names.add(head.group(1))
    return {n for n in names if not n.endswith(("_alias", "_warn")) and n != "__attribute__"}


def tables(markdown):
    """Name -> is it interposed."""
    names, interposed = {}, None
    for line in markdown.splitlines():
        if line.startswith("## "):
            interposed = line.startswith("## Interposed")
        elif line.startswith("| `"):
            for name in re.findall(r"`(\w+)`", line.split("|")[1]):
                if name in names:
                    sys.exit(f"CALLS.md: {name} is there twice")
                names[name] = interposed
    return names


def exported(text):
    return set(re.findall(r"\b(\w+);", text.split("global:")[1].split("local:")[0]))


def self_test():
    text = "extern int f (int __fd, char *x) __attribute__ ((nothrow)); extern int g (char *x); extern int h (const char *s, int in_fd);"
    assert takes_descriptor(text) == {"f", "h"}, takes_descriptor(text)
    assert tables("## Interposed: x\n| `a` `b` | `c` |\n## Not interposed\n| `d` | |\n") == {"a": True, "b": True, "d": False}
    assert exported("{ global: a; b; local: *; }") == {"a", "b"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cc", default="cc")
    parser.add_argument("calls")
    parser.add_argument("map")
    args = parser.parse_args()
    self_test()
    source = "#define _GNU_SOURCE 1\n#define _FORTIFY_SOURCE 2\n" + "".join(f"#include <{h}.h>\n" for h in HEADERS)
    known = takes_descriptor(subprocess.run([args.cc, "-x", "c", "-O2", "-E", "-P", "-"], input=source, check=True,
                                            capture_output=True, text=True).stdout)
    with open(args.calls, encoding="utf-8") as file:
        written = tables(file.read())
    with open(args.map, encoding="utf-8") as file:
        ours = exported(file.read())
    problems = [f"takes a descriptor and is not in CALLS.md: {n}" for n in sorted(known - set(written))]
    problems += [f"exported and not in CALLS.md as interposed: {n}" for n in sorted(ours) if not written.get(n)]
    problems += [f"in CALLS.md as interposed and not exported: {n}" for n, is_ours in sorted(written.items()) if is_ours and n not in ours]
    print("\n".join(problems + [f"calls: {len(known)} functions take a descriptor, {len(ours)} names are interposed"]))
    return 1 if problems or len(known) < 100 else 0


sys.exit(main())
