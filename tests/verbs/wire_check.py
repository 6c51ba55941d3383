"""SDP's rules, checked on what Wireshark says of a capture. Pure functions over its rows; wire_test.py gets them from tshark.

    roce_lanes(rows), iwarp_lanes(rows)   the rows of tshark -> lanes, each a list of Message in the order of the capture
    check_lane(lane)                      the rules of one lane
    anchors(rows), check_anchor(...)      TCP connections, and that one carries nothing of what its lane does

A row is a dict from the name of a tshark field to its text, "" where the packet has no such field. What breaks a rule raises
Violation. The capture is taken on the wire between the two ends: it holds a message before its receiver has it, and so an
acknowledgement or a grant not later than its reader can act on it. All rules hold in that order too.
"""
import ipaddress
import math
from collections import Counter
from dataclasses import dataclass, field

SDP_FIELDS = [f"infiniband_sdp.bsdh.{name}" for name in ("mid", "flags", "bufs", "len", "mseq", "mseqack")]
HELLO_FIELDS = [f"infiniband_sdp.hh.{name}" for name in (
    "majv", "minv", "ipv", "cap", "maxadverts", "desremrcvsz", "localrcvsz", "localport", "src_ip", "dst_ip", "extmaxadverts")]
TCP_FIELDS = ["frame.number", "ip.src", "ip.dst", "tcp.stream", "tcp.srcport", "tcp.dstport", "tcp.seq", "tcp.len"]
PACKET_FIELDS = ["udp.length", *(f"infiniband.{name}" for name in (
    "bth.opcode", "bth.destqp", "bth.psn", "bth.padcnt",
    "mad.transactionid", "cm.req.serviceid", "cm.req.localqpn", "cm.rep.localqpn"))]
SEGMENT_FIELDS = ["iwarp_mpa.ulpdulength", "iwarp_rdma.opcode", "iwarp_ddp.last_flag", "iwarp_ddp.msn", "iwarp_ddp.mo"]
ROCE_FIELDS = TCP_FIELDS + PACKET_FIELDS + SDP_FIELDS + HELLO_FIELDS
IWARP_FIELDS = TCP_FIELDS + SEGMENT_FIELDS + SDP_FIELDS + HELLO_FIELDS

HELLO, HELLO_ACK, DISCONN, WR_COMPL, CH_RCV_BUF, CH_RCV_BUF_ACK, SRC_AVAIL, DATA = 0x00, 0x01, 0x02, 0x05, 0x0B, 0x0C, 0xFE, 0xFF
BASE_HEADER, HELLO_LENGTH, HELLO_ACK_LENGTH = 16, 68, 24
ONE_PACKET, MARK = 256, 4   # where a device mixes messages a longer one ends with its MSeq, which Len does not count
RESERVED_CREDITS = 2
DIALLER, ANSWERER = 0, 1  # sides of a lane
RDMA_PS_IB = 0x013F0000
SERVICE_PORTS = 64512     # of those below 1024
NO_QP = 1                 # what an offer's request names
SENDS = SEND_FIRST, SEND_MIDDLE, SEND_LAST, SEND_ONLY = 0, 1, 2, 4
WRITES = (6, 7, 8, 10)
NO_REQUESTS = (17, 100)   # Acknowledge; UD, the CM's
UDP_HEADER, BTH, ICRC = 8, 12, 4
DDP_HEADER = 18           # of an untagged segment, RDMAP's control byte included
PSNS = 1 << 24


class Violation(Exception):
    """A rule is broken; says which, where."""


def demand(holds, frame, rule):
    if not holds:
        raise Violation(f"frame {frame}: {rule}")


@dataclass
class Message:
    frame: int
    side: int           # who sent it
    mid: int
    flags: int
    bufs: int
    length: int
    mseq: int
    mseqack: int
    on_wire: int        # bytes of the whole message, as the transport carried them
    hello: dict = field(default_factory=dict)

    def payload(self):
        return self.length - BASE_HEADER if self.mid == DATA else 0


@dataclass
class Lane:
    messages: list
    service_id: int = 0     # of the dialler's request; 0: none on this transport


@dataclass
class Summary:
    mids: tuple = field(default_factory=lambda: (Counter(), Counter()))     # by side
    payload: list = field(default_factory=lambda: [0, 0])
    source: tuple = ()      # the anchor's end at the dialler: address, port
    destination: str = ""   # the address of the other


def number(text):
    return int(text, 0)


def message(row, frame, side, pick=0):
    """`pick`: the how manyth SDP message of the packet."""
    if not row[SDP_FIELDS[0]]:
        raise Violation(f"frame {frame}: a Send that Wireshark does not decode as SDP")
    mid, *rest = (number(row[name].split(",")[pick]) for name in SDP_FIELDS)
    hello = {name.rsplit(".", 1)[1]: row[name] for name in HELLO_FIELDS if row[name]} if mid == HELLO else {}
    return Message(frame, side, mid, *rest, on_wire=0, hello=hello)


def carried(length, marks=True):
    """Bytes of a message of that Len, as the transport carries them."""
    return length + MARK if marks and length > ONE_PACKET else length


# --- lanes out of packets

class Direction:
    """Puts the Sends of one direction together; `lane` gets the messages."""

    def __init__(self, lane, side):
        self.lane, self.side = lane, side
        self.newest = None      # PSN, or MSN
        self.starts = {}        # by PSN
        self.open = None

    def start(self, made):
        demand(self.open is None, made.frame, "a message begins inside another")
        self.open = made
        self.lane.messages.append(made)

    def add(self, frame, count, last):
        demand(self.open is not None, frame, "a message goes on that has not begun")
        self.open.on_wire += count
        if last:
            self.open = None


def roce_lanes(rows):
    """Lanes, and the ports whose servers were sent an offer. A request and its transaction's reply name the two queue pairs."""
    requests, directions, lanes, offered = {}, {}, [], set()
    for row in rows:
        frame = number(row["frame.number"])
        if row["infiniband.cm.req.serviceid"]:
            service, qpn = number(row["infiniband.cm.req.serviceid"]), number(row["infiniband.cm.req.localqpn"])
            demand(service >> 16 == RDMA_PS_IB >> 16, frame, f"service id {service:#x} is not of RDMA_PS_IB")
            if qpn == NO_QP:
                offered.add(service & 0xFFFF)
            else:
                requests[row["infiniband.mad.transactionid"]] = (service, row["ip.src"], qpn)
        elif row["infiniband.cm.rep.localqpn"]:
            request = requests.pop(row["infiniband.mad.transactionid"], None)
            demand(request, frame, "a reply without its request")
            service, address, qpn = request
            lane = Lane([], service)
            lanes.append(lane)
            directions[row["ip.src"], number(row["infiniband.cm.rep.localqpn"])] = Direction(lane, DIALLER)
            directions[address, qpn] = Direction(lane, ANSWERER)
        elif row["infiniband.bth.opcode"] and number(row["infiniband.bth.opcode"]) not in NO_REQUESTS:
            to = (row["ip.dst"], number(row["infiniband.bth.destqp"]))
            opcode = number(row["infiniband.bth.opcode"])
            demand(opcode in SENDS + WRITES, frame, f"opcode {opcode} is none of ours")
            demand(to in directions, frame, f"a request to {to}, of which no REQ and REP spoke")
            roce_request(directions[to], row, frame, opcode)
    for direction in directions.values():
        demand(direction.open is None, "last", "a message does not end")
    return lanes, offered


def roce_request(direction, row, frame, opcode):
    psn = number(row["infiniband.bth.psn"])
    ahead = (psn - direction.newest) % PSNS if direction.newest is not None else 1
    if ahead != 1:
        if psn in direction.starts:  # sent again: the same message, as its number says
            first, again = direction.starts[psn], message(row, frame, direction.side)
            demand((first.mid, first.mseq, first.length) == (again.mid, again.mseq, again.length), frame,
                   f"PSN {psn} again, with another message")
        return  # nor does the receiver take one that is too early: it comes again
    direction.newest = psn
    if opcode not in SENDS:
        return
    if opcode in (SEND_FIRST, SEND_ONLY):
        made = direction.starts[psn] = message(row, frame, direction.side)
        direction.start(made)
    count = number(row["udp.length"]) - UDP_HEADER - BTH - ICRC - number(row["infiniband.bth.padcnt"])
    direction.add(frame, count, opcode in (SEND_LAST, SEND_ONLY))


def iwarp_lanes(rows):
    """Each TCP connection that holds segments of DDP is a lane; its dialler is who sends first."""
    lanes, directions = {}, {}
    for row in rows:
        if not row["iwarp_rdma.opcode"]:
            continue
        frame, stream, port = number(row["frame.number"]), row["tcp.stream"], row["tcp.srcport"]
        columns = {name: row[name].split(",") for name in SEGMENT_FIELDS}
        untagged = starts = 0
        for at, opcode in enumerate(number(text) for text in columns["iwarp_rdma.opcode"]):
            if opcode in (1, 7):  # Read Request, Terminate: untagged, on queues of their own
                untagged += 1
            if not 3 <= opcode <= 6:
                continue
            msn, offset = (number(columns[f"iwarp_ddp.{name}"][untagged]) for name in ("msn", "mo"))
            untagged += 1
            lane = lanes.setdefault(stream, Lane([]))
            direction = directions.get((stream, port))
            if direction is None:
                side = ANSWERER if lane.messages else DIALLER
                direction = directions[stream, port] = Direction(lane, side)
            if offset == 0:
                expected = 1 if direction.newest is None else direction.newest + 1
                demand(msn == expected, frame, f"DDP message {msn} after {expected - 1}")
                direction.newest = msn
                direction.start(message(row, frame, direction.side, starts))
                starts += 1
            demand(msn == direction.newest, frame, f"a segment of DDP message {msn} in message {direction.newest}")
            demand(direction.open and offset == direction.open.on_wire, frame, f"a segment at {offset} is not the next")
            last = columns["iwarp_ddp.last_flag"][at] not in ("0", "False")
            direction.add(frame, number(columns["iwarp_mpa.ulpdulength"][at]) - DDP_HEADER, last)
    for direction in directions.values():
        demand(direction.open is None, "last", "a message does not end")
    return list(lanes.values())


# --- the rules of a lane

def check_hello(hello, ack):
    at = hello.frame
    demand((hello.mid, hello.side, hello.length) == (HELLO, DIALLER, HELLO_LENGTH), at, f"Hello comes first, not {hello}")
    demand((ack.mid, ack.side, ack.length) == (HELLO_ACK, ANSWERER, HELLO_ACK_LENGTH), ack.frame,
           f"HelloAck comes second, not {ack}")
    for each in (hello, ack):
        demand(each.mseq == each.mseqack == each.flags == 0, each.frame, "Hello and HelloAck are outside the numbering")
        demand(each.on_wire == each.length, each.frame, f"Len {each.length} of {each.on_wire} bytes")
        demand(each.bufs > RESERVED_CREDITS, each.frame, "a first grant that lets no payload out")
    said = hello.hello
    demand(len(said) == len(HELLO_FIELDS), at, f"Hello is cut short: {said}")
    value = {name: number(said[name]) for name in said if not name.endswith("_ip")}
    demand((value["majv"], value["minv"]) == (2, 2), at, f"not version 2.2: {said}")
    demand(value["cap"] == value["extmaxadverts"] == 0, at, f"capabilities: {said}")
    demand(value["maxadverts"] >= 1 and value["localport"] > 0, at, f"no adverts or no port: {said}")
    demand(value["localrcvsz"] > BASE_HEADER and value["desremrcvsz"] > BASE_HEADER, at, f"buffers that hold no payload: {said}")
    ends = [ipaddress.IPv6Address(said[name]) for name in ("src_ip", "dst_ip")]
    if value["ipv"] == 4:  # the last four bytes, behind zeros
        demand(all(int(ip) >> 32 == 0 for ip in ends), at, f"no IPv4 addresses: {said}")
        ends = [ipaddress.IPv4Address(int(ip)) for ip in ends]
    else:
        demand(value["ipv"] == 6, at, f"IP version {value['ipv']}")
    return str(ends[0]), value["localport"], str(ends[1])


def check_lane(lane):
    messages = lane.messages
    demand(len(messages) >= 2, messages[0].frame if messages else "last", "a lane without Hello and HelloAck")
    hello, ack = messages[:2]
    address, port, destination = check_hello(hello, ack)
    summary = Summary(source=(address, port), destination=destination)
    sent, acked = [0, 0], [0, 0]            # by sender: MSeq of its last message; what it has acknowledged
    limit = [ack.bufs, hello.bufs]          # by sender: the highest MSeq that it may send
    fixed = number(hello.hello["localrcvsz"])  # of the dialler's buffers, until it says that they grew
    ended = [False, False]
    asked = [0, 0]                          # by sender of a ChRcvBuf: the MSeq of its answer. Until it has that it may use up buffers
    written = [0, 0]                        # by sender: MSeq of its last RdmaWrCompl, whose acknowledgement it waits for
    marks = next((m.on_wire != m.length for m in messages if m.length > ONE_PACKET), False)  # all of them, or none
    for m in messages[2:]:
        me, other = m.side, 1 - m.side
        credits, grant = limit[me] - sent[me], m.mseqack + m.bufs
        demand(m.mid not in (HELLO, HELLO_ACK), m.frame, "a second Hello")
        demand(m.mseq == sent[me] + 1, m.frame, f"MSeq {m.mseq} after {sent[me]}")
        demand(m.mseqack <= sent[other], m.frame, f"MSeqAck {m.mseqack}, but only {sent[other]} were sent")
        demand(m.mseqack >= acked[me], m.frame, f"MSeqAck {m.mseqack} after {acked[me]}")
        demand(m.on_wire == carried(m.length, marks), m.frame, f"Len {m.length} of {m.on_wire} bytes")
        demand(m.length >= BASE_HEADER, m.frame, f"Len {m.length}")
        demand(grant >= limit[other], m.frame, f"{limit[other] - grant} credits were taken back")
        demand(me == DIALLER or fixed is None or m.on_wire <= fixed, m.frame, f"{m.on_wire} bytes for buffers of {fixed}")
        more = grant > limit[other]
        if m.payload() > 0 or m.mid == SRC_AVAIL:
            demand(credits > RESERVED_CREDITS, m.frame, f"payload with {credits} credits")
            demand(not ended[me], m.frame, "payload after DisConn")
        elif m.mid == DATA:
            sweep = m.mseqack < asked[me] and credits > RESERVED_CREDITS
            answer = acked[me] < written[other] <= m.mseqack and credits > RESERVED_CREDITS
            demand(credits >= 1 and more or sweep or answer, m.frame, f"an update that grants nothing, or with {credits} credits")
        else:
            demand(credits >= 2 or credits == 1 and more, m.frame, f"control with {credits} credits")
        if m.mid == DISCONN:
            demand(not ended[me], m.frame, "a second DisConn")
            ended[me] = True
        if m.mid == CH_RCV_BUF_ACK and me == DIALLER:
            fixed = None
        if m.mid == CH_RCV_BUF:
            asked[me] = math.inf
        elif m.mid == CH_RCV_BUF_ACK:
            asked[other] = m.mseq
        if m.mid == WR_COMPL:
            written[me] = m.mseq
        sent[me], acked[me], limit[other] = m.mseq, m.mseqack, grant
        summary.mids[me][m.mid] += 1
        summary.payload[me] += m.payload()
    return summary


# --- the TCP connections beside them

@dataclass
class Anchor:
    """Of each end, an (address, port): the bytes that it sent, and the last frame that brought new ones."""
    bytes: dict
    last_frame: dict


def anchors(rows):
    """TCP connections by the frozenset of their ends, those of iWARP's not left out. The capture must hold their starts."""
    found = {}
    for row in rows:
        if not row["tcp.stream"]:
            continue
        here, there = (row["ip.src"], number(row["tcp.srcport"])), (row["ip.dst"], number(row["tcp.dstport"]))
        anchor = found.setdefault(frozenset((here, there)), Anchor({here: 0, there: 0}, {here: 0, there: 0}))
        count = number(row["tcp.len"])
        upto = number(row["tcp.seq"]) - 1 + count  # SYN has number 0
        if count and upto > anchor.bytes[here]:
            anchor.bytes[here] = upto
            anchor.last_frame[here] = number(row["frame.number"])
    return found


def check_anchor(anchor, lane, dialler, buffers):
    """After `buffers` messages with payload their receiver has taken the first, which it does when it has read all that TCP brought
    before: from then on TCP brings nothing in that direction."""
    for side, end in enumerate((dialler, *(e for e in anchor.bytes if e != dialler))):
        told = [m.frame for m in lane.messages if m.side == side and m.payload() > 0]
        if len(told) > buffers:
            demand(anchor.last_frame[end] < told[buffers], anchor.last_frame[end], f"TCP brings bytes beside the lane, from {end}")
