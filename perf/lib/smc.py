"""The kernel's SMC: what has to be said to it before it carries anything, and which connections it has carried.

smc-tools is not in Debian 12. What is needed of it is four generic netlink messages, whose layout is <linux/smc.h>'s, and smc_run, whose
work libsmcfamily.so does (perf/smc_family.cpp).
"""
import socket
import struct

GENL_CTRL, CTRL_GETFAMILY, CTRL_FAMILY_ID, CTRL_FAMILY_NAME = 16, 3, 1, 2
FLAG_REQUEST, FLAG_ACK, FLAG_DUMP = 1, 4, 0x300
TYPE_ERROR, TYPE_DONE = 2, 3
GET_STATS, ADD_UEID, UEID = 7, 10, 1
STATS, STATS_BY_TECHNIQUE, STATS_CLIENTS = 7, {"SMC-D": 1, "SMC-R": 2}, (7, 8)
PNETID_ADD, PNETID_FLUSH, PNETID_NAME, PNETID_IBNAME = 2, 4, 1, 3
LOOPBACK = "loopback-ism"


def attribute(kind, data):
    data = data.encode() + b"\0" if isinstance(data, str) else data
    return struct.pack("HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def attributes(data):
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("HH", data)
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3:]
    return found


def converse(family, command, flags=0, payload=b""):
    """One request; returns the attributes of each answer. OSError: what the kernel says."""
    answers = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16) as netlink:
        body = struct.pack("BBH", command, 1, 0) + payload
        netlink.send(struct.pack("IHHII", 16 + len(body), family, FLAG_REQUEST | FLAG_ACK | flags, 1, 0) + body)
        while True:
            data = netlink.recv(1 << 16)
            while data:
                length, kind = struct.unpack_from("IH", data)
                if kind in (TYPE_ERROR, TYPE_DONE):
                    error = -struct.unpack_from("i", data, 16)[0]
                    if error:
                        raise OSError(error, "SMC does not take it")
                    return answers
                answers.append(attributes(data[20:length]))
                data = data[(length + 3) & ~3:]


def family(name):
    """Its number; OSError if the kernel has no such family."""
    return struct.unpack("H", converse(GENL_CTRL, CTRL_GETFAMILY, 0, attribute(CTRL_FAMILY_NAME, name))[0][CTRL_FAMILY_ID])[0]


def set_up(name="SDPRELOAD"):
    """Without a common name SMC falls back to TCP, and says nothing. OSError: no SMC here."""
    converse(family("SMC_GEN_NETLINK"), ADD_UEID, 0, attribute(UEID, name.ljust(32)))


def shut_loopback(shut):
    """Two ends on one host meet by SMC-D's loopback device, whatever else there is. On a network of its own, which no interface is on, it
    serves nobody, and they meet by SMC-R."""
    pnet = family("SMC_PNETID")
    if shut:
        converse(pnet, PNETID_ADD, 0, attribute(PNETID_NAME, "NOBODY") + attribute(PNETID_IBNAME, LOOPBACK))
    else:
        converse(pnet, PNETID_FLUSH)


def connections():
    """How many clients' connections each technique has taken on, since the guest was started."""
    stats = {}
    for answer in converse(family("SMC_GEN_NETLINK"), GET_STATS, FLAG_DUMP):
        stats.update(attributes(answer.get(STATS, b"")))
    taken = {}
    for technique, kind in STATS_BY_TECHNIQUE.items():
        each = attributes(stats.get(kind, b""))
        taken[technique] = sum(struct.unpack("Q", each[version])[0] for version in STATS_CLIENTS if version in each)
    return taken
