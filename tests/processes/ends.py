"""A server and a client, each a process of its own: started with nothing of ours in the environment but what is asked for, and ended."""
import os
import subprocess


def environment(**settings):
    plain = {k: v for k, v in os.environ.items() if not k.startswith("SDP_") and k != "LD_PRELOAD"}
    return {**plain, **settings}


def start(command, env):
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(ends, status=0, excused=None):
    """What each has printed, by role. Both end with `status`; nobody has to if one ends with `excused`."""
    try:
        said = {role: "".join(end.communicate(timeout=20)) for role, end in ends.items()}
    except subprocess.TimeoutExpired:
        raise AssertionError("somebody hangs") from None
    finally:
        for end in ends.values():
            end.kill()
            end.wait()
    for role, end in ends.items() if excused not in [end.returncode for end in ends.values()] else ():
        assert end.returncode == status, f"the {role} ended with {end.returncode}: {said[role]}"
    return said
