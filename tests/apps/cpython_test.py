#!/usr/bin/env python3
"""CPython's own tests of sockets and of what is built on them, from Debian, plain and under the library: the same outcome of each.

    cpython_test.py --lib LIBRARY [MODULE...]

Each module is a process, in a network of its own. With the library its connections get lanes from the first message on, between the
threads of the one process; how many bytes lanes carried is by the library's report.
"""
import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor

from harness import PYTHON, Skip, enter_private_network, need

# The longest first. In each of the first ones lanes must carry bytes; the connections of the others are too short, or are none.
WITH_LANES = ("test_xmlrpc", "test_imaplib", "test_socket", "test_ssl", "test_httplib", "test_ftplib", "test_poplib",
              "test_asyncio.test_sendfile", "test_asyncio.test_streams", "test_asyncio.test_events")
OTHERS = ("test_subprocess", "test_selectors", "test_poll", "test_select", "test_epoll", "test_asyncore", "test_asynchat", "test_smtplib",
          "test_httpservers", "test_telnetlib", "test_urllib2_localnet", "test_socketserver", "test_asyncio.test_server",
          "test_asyncio.test_sock_lowlevel", "test_wsgiref")
LEFT_OUT = ("*VSOCK*", "*Vsock*")  # wait for ever where the host has that family and nobody answers
LIMIT_S = 240
IN_A_NETWORK = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


def outcomes(path):
    """Test -> how it ended, of a JUnit report."""
    found = {}
    for case in xml.etree.ElementTree.parse(path).getroot().iter("testcase"):
        ended = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[case.get("name")] = ended[0] if ended else "passed"
    return found


def run(python, module, library, folder):
    """(outcomes, what it printed, bytes that lanes carried)."""
    report = os.path.join(folder, "outcomes.xml")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SDP_")}
    if library:
        env.update(LD_PRELOAD=library, SDP_STATS=os.path.join(folder, "%p.json"), SDP_UPGRADE_MESSAGES="1", SDP_LOG="error")
    skip = [word for pattern in LEFT_OUT for word in ("-i", pattern)]
    done = subprocess.run([*IN_A_NETWORK, python, "-m", "test", "-u", "network", *skip, "--junit-xml", report, module], env=env, cwd=folder, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False)
    carried = 0
    for path in glob.glob(os.path.join(folder, "*.json")):
        with open(path, encoding="utf-8") as file:
            carried += sum(json.load(file)["bytes"]["lane"].values())
    return (outcomes(report) if os.path.exists(report) else {}), done.stdout, carried


def compare(python, module, library):
    """Says how it went; False: not as it should."""
    with tempfile.TemporaryDirectory(prefix="sdp-cpython-") as folder:
        plain_folder, sdp_folder = os.path.join(folder, "plain"), os.path.join(folder, "sdp")
        os.mkdir(plain_folder)
        os.mkdir(sdp_folder)
        try:
            plain, _, _ = run(python, module, None, plain_folder)
            ours, said, carried = run(python, module, library, sdp_folder)
        except subprocess.TimeoutExpired as late:
            print(f"{module}: did not end in {LIMIT_S} s\n{late.output}", flush=True)
            return False
    differ = sorted(name for name in plain.keys() | ours.keys() if plain.get(name) != ours.get(name))
    passed = sum(outcome == "passed" for outcome in ours.values())
    good = passed != 0 and not differ and (module not in WITH_LANES or carried != 0)
    print(f"{module}: {passed} of {len(ours)} passed as on TCP, {carried} bytes by lanes{'' if good else '  WRONG'}", flush=True)
    for name in differ:
        print(f"  {name}: plain {plain.get(name)}, with the library {ours.get(name)}", flush=True)
    if not good:
        print(said, flush=True)
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lib", required=True)
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    args = parser.parse_args()
    library = os.path.abspath(args.lib)
    try:
        enter_private_network()
        python = need(PYTHON)
        if subprocess.run([python, "-c", "import test.test_socket"], stderr=subprocess.DEVNULL, check=False).returncode != 0:
            raise Skip("CPython's tests are not installed: libpython3.11-testsuite")
    except Skip as reason:
        print(f"skipped: {reason}")
        return 77
    # They wait more than they work.
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda module: compare(python, module, library), args.modules or WITH_LANES + OTHERS))
    return 0 if all(results) else 1


sys.exit(main())
