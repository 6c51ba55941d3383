"""vsftpd with curl: a connection for control and one for each file, passive and active, from a process that is locked in."""
import os

import web
from harness import Skip, file_digest, need
from . import Case

PROGRAM = ("vsftpd", "vsftpd", "curl")

CONFIG = """
listen=YES
background=NO
listen_address={address}
listen_port={port}
anonymous_enable=YES
anon_root={dir}/ftp
anon_upload_enable=YES
write_enable=YES
anon_umask=022
no_anon_password=YES
secure_chroot_dir={dir}/empty
connect_from_port_20=NO
"""


def run(r):
    vsftpd, curl = need("vsftpd", "curl")
    if not r.place.is_root:
        raise Skip("vsftpd needs root")
    port = r.port()
    for folder in ("ftp/incoming", "empty"):
        os.makedirs(r.path(folder))
    os.chmod(r.path("ftp/incoming"), 0o777)
    data = r.random_file("ftp/data", r.amount(32 << 20))
    with open(r.path("vsftpd.conf"), "w", encoding="ascii") as config:
        config.write(CONFIG.format(dir=r.dir, address=r.address, port=port))
    r.server([vsftpd, r.path("vsftpd.conf")], port)
    url = f"ftp://{r.host}:{port}"
    passive = web.fetch(r, url + "/data")
    active = web.fetch(r, url + "/data", "--ftp-port", "-")
    r.client([curl, "-sS", "-T", data, url + "/incoming/data"])
    return passive, active, file_digest(r.path("ftp/incoming/data"))


# One process accepts and passes on to another.
CASES = [Case("vsftpd", run, "curl: 32 MB passive, active, and there", share=None, payload=96 << 20)]
