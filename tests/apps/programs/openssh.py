"""OpenSSH, both ends of it: commands, scp, sftp and a forwarded port, through an sshd that forks, execs, gives up root and locks itself in."""
import getpass
import hashlib
import os

import web
from harness import Skip, file_digest, need
from . import Case, nginx

PROGRAM = ("OpenSSH", "openssh-server", "openssh-client")

SSHD = """
Port {port}
ListenAddress {address}
HostKey {dir}/host_key
PidFile none
AuthorizedKeysFile {dir}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
Subsystem sftp internal-sftp
"""
SSH = """
Host *
  Port {port}
  User {user}
  IdentityFile {dir}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def start(r):
    """An sshd that lets in who runs this; returns the options by which a client comes to it."""
    sshd, keygen, _ = need("sshd", "ssh-keygen", "ssh")
    if not r.place.is_root:
        raise Skip("sshd needs root to separate its privileges")
    port = r.port()
    os.makedirs("/run/sshd", exist_ok=True)
    for key in ("host_key", "key"):
        r.prepare([keygen, "-q", "-t", "ed25519", "-N", "", "-f", r.path(key)])
    for name, text in (("sshd_config", SSHD), ("ssh_config", SSH)):
        with open(r.path(name), "w", encoding="ascii") as config:
            config.write(text.format(dir=r.dir, port=port, address=r.address, user=getpass.getuser()))
    r.server([sshd, "-D", "-e", "-f", r.path("sshd_config")], port)
    return ["-F", r.path("ssh_config")]


def shell(r):
    options = start(r)
    data = r.random_file("data", r.amount(8 << 20))
    got = r.client([need("ssh"), *options, r.address, f"cat {data}"], text=False).stdout
    with open(data, "rb") as stdin:
        put = r.client([need("ssh"), *options, r.address, "sha256sum; echo done >&2; exit 3"], check=False, text=False, stdin=stdin.read())
    return hashlib.sha256(got).hexdigest(), put.stdout, put.stderr, put.returncode


def copies(program):
    """A file there and back again, by scp and by sftp."""
    def run(r):
        options = start(r)
        data = r.random_file("data", r.amount(8 << 20))
        if program == "scp":
            r.client([need("scp"), *options, data, f"{r.address}:{r.path('there')}"])
            r.client([need("scp"), *options, f"{r.address}:{r.path('there')}", r.path("back")])
        else:
            r.client([need("sftp"), *options, "-b", "-", r.address], stdin=f"put {data} {r.path('there')}\nget {r.path('there')} {r.path('back')}\n")
        return file_digest(r.path("there")), file_digest(r.path("back"))
    return run


def forward(r):
    """curl through a port of ssh's to an nginx beside sshd; who is next to a program of one role has the other."""
    options = start(r)
    web_port, port = nginx.start(r, r.amount(16 << 20), role="client"), r.port()
    r.server([need("ssh"), *options, "-N", "-L", f"{port}:{r.host}:{web_port}", r.address], port, role="client")
    return [web.fetch(r, f"http://127.0.0.1:{port}/data", role="server") for _ in range(2)]


# sshd executes itself for each connection, which comes to the new program from outside, and so stays on TCP. What sshd forwards to does not.
CASES = [
    Case("openssh_shell", shell, "ssh: commands that read and write 8 MB", share=None, payload=16 << 20),
    Case("openssh_scp", copies("scp"), "scp, 8 MB both ways", share=None, payload=16 << 20),
    Case("openssh_sftp", copies("sftp"), "sftp, 8 MB both ways", share=None, payload=16 << 20),
    Case("openssh_forward", forward, "a port forwarded (-L) to nginx, curl", share=0.5, payload=96 << 20, unseen=33 << 20),
]
