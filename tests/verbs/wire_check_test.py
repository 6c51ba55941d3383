#!/usr/bin/env python3
"""The checker of captures, on a lane made up here: a sound one passes, and each damage to it is found and named."""
import copy
import sys
import unittest

import wire_check as w
from wire_check import ANSWERER, DATA, DIALLER, Message, Violation

HERE, THERE = "10.0.0.1", "10.0.0.2"
SAID = {"majv": "0x02", "minv": "0x02", "ipv": "0x04", "cap": "0x00", "maxadverts": "1", "desremrcvsz": "2048",
        "localrcvsz": "2048", "localport": "5001", "src_ip": f"::{HERE}", "dst_ip": f"::{THERE}", "extmaxadverts": "0"}


def sound_messages():
    """Hello, HelloAck, eight requests and answers of 100 and 2000 bytes, a grant, an end: as two sides would say it."""
    said = [Message(0, DIALLER, w.HELLO, 0, 8, 68, 0, 0, 68, dict(SAID)), Message(0, ANSWERER, w.HELLO_ACK, 0, 8, 24, 0, 0, 24)]
    sent = [0, 0]

    def say(side, mid, length, bufs):
        sent[side] += 1
        said.append(Message(0, side, mid, 0, bufs, length, sent[side], sent[1 - side], w.carried(length)))
    for _ in range(8):
        say(ANSWERER, DATA, 116, 8)
        say(DIALLER, DATA, 2016, 8)
    for _ in range(4):
        say(DIALLER, DATA, 116, 8)
    say(ANSWERER, DATA, 16, 8)  # grants
    say(DIALLER, w.DISCONN, 16, 8)
    say(ANSWERER, w.DISCONN, 16, 8)
    for at, each in enumerate(said):
        each.frame = at + 1
    return said


def empty_row(fields, frame, **values):
    row = dict.fromkeys(fields, "")
    row.update({"frame.number": str(frame), **values})
    return row


def sdp_values(m):
    values = (f"{m.mid:#04x}", f"{m.flags:#04x}", str(m.bufs), str(m.length), f"{m.mseq:#x}", f"{m.mseqack:#x}")
    return dict(zip(w.SDP_FIELDS, values)) | {f"infiniband_sdp.hh.{name}": text for name, text in m.hello.items()}


def cm_row(source, transaction, **values):
    common = {"ip.src": source, "infiniband.mad.transactionid": transaction, "infiniband.bth.opcode": "100"}
    return empty_row(w.ROCE_FIELDS, 0, **common, **values)


def roce_rows(messages, mtu=1024):
    """Request, reply, and each message in packets of `mtu` bytes. Both ends have queue pair 19, as two devices of one host may."""
    rows = [cm_row(THERE, "0x1", **{"infiniband.cm.req.serviceid": "0x00000000013f1389", "infiniband.cm.req.localqpn": "0x000001"}),
            cm_row(HERE, "0x2", **{"infiniband.cm.req.serviceid": "0x00000000013faaff", "infiniband.cm.req.localqpn": "0x000013"}),
            cm_row(THERE, "0x2", **{"infiniband.cm.rep.localqpn": "0x000013"})]
    psn = [w.PSNS - 3, 70]  # the first wraps round
    for m in messages:
        ends = (HERE, THERE) if m.side == DIALLER else (THERE, HERE)
        pieces = [min(mtu, m.on_wire - at) for at in range(0, m.on_wire, mtu)]
        for at, count in enumerate(pieces):
            opcode = 4 if len(pieces) == 1 else 0 if at == 0 else 2 if at == len(pieces) - 1 else 1
            pad = -count % 4
            values = {"ip.src": ends[0], "ip.dst": ends[1], "udp.length": str(8 + 12 + count + pad + 4),
                      "infiniband.bth.destqp": "0x000013", "infiniband.bth.opcode": str(opcode),
                      "infiniband.bth.psn": str(psn[m.side]), "infiniband.bth.padcnt": str(pad)}
            values |= sdp_values(m) if at == 0 else dict.fromkeys(w.SDP_FIELDS, "0x53")  # what Wireshark takes payload for
            rows.append(empty_row(w.ROCE_FIELDS, m.frame, **values))
            psn[m.side] = (psn[m.side] + 1) % w.PSNS
    return rows


def iwarp_rows(messages, segment=1424, merged=False):
    """A packet for each segment; `merged`: all of a message in one."""
    rows, msn = [], [0, 0]
    for m in messages:
        msn[m.side] += 1
        pieces = [min(segment, m.on_wire - at) for at in range(0, m.on_wire, segment)]
        columns = [(str(count + 18), "0x03", str(int(at == len(pieces) - 1)), str(msn[m.side]), str(at * segment))
                   for at, count in enumerate(pieces)]
        packets = [columns] if merged else [[c] for c in columns]
        for at, packet in enumerate(packets):
            values = dict(zip(w.SEGMENT_FIELDS, (",".join(each) for each in zip(*packet))))
            values |= {"tcp.stream": "3", "tcp.srcport": "40000" if m.side == DIALLER else "50000"}
            rows.append(empty_row(w.IWARP_FIELDS, m.frame, **values, **(sdp_values(m) if at == 0 else {})))
    return rows


def tcp_row(frame, here, there, seq, count):
    return empty_row(w.TCP_FIELDS, frame, **{"ip.src": here[0], "ip.dst": there[0], "tcp.stream": "0", "tcp.srcport": str(here[1]),
                                             "tcp.dstport": str(there[1]), "tcp.seq": str(seq), "tcp.len": str(count)})


class Checker(unittest.TestCase):
    def refused(self, why, lane):
        with self.assertRaisesRegex(Violation, why):
            w.check_lane(lane)

    def damaged(self, why, at, **changes):
        """The sound lane with some fields of message `at` changed."""
        messages = sound_messages()
        for name, value in changes.items():
            setattr(messages[at], name, value)
        self.refused(why, w.Lane(messages))

    def test_a_sound_lane(self):
        summary = w.check_lane(w.Lane(sound_messages()))
        self.assertEqual(summary.payload, [8 * 2000 + 4 * 100, 8 * 100])
        self.assertEqual((summary.source, summary.destination), ((HERE, 5001), THERE))
        self.assertEqual(summary.mids[DIALLER][w.DISCONN], 1)
        unmarked = sound_messages()
        for m in unmarked:
            m.on_wire = m.length
        w.check_lane(w.Lane(unmarked))

    def test_every_message_is_missed(self):
        for at in range(len(sound_messages()) - 2):  # of each side's last one nobody can tell
            messages = sound_messages()
            del messages[at]
            self.refused("Hello|MSeq|grants nothing", w.Lane(messages))

    def test_every_message_is_seen_twice(self):
        for at in range(2, len(sound_messages())):
            messages = sound_messages()
            messages.insert(at + 1, copy.deepcopy(messages[at]))
            self.refused("MSeq|grants nothing", w.Lane(messages))

    def test_numbers(self):
        messages = sound_messages()
        messages[2].mseq, messages[4].mseq = messages[4].mseq, messages[2].mseq
        self.refused("MSeq 2 after 0", w.Lane(messages))
        self.damaged("MSeqAck 2, but only 1", 3, mseqack=2)
        self.damaged("MSeqAck 0 after 1", 5, mseqack=0, bufs=64)
        self.damaged("Len 116 of 115", 2, on_wire=115)
        self.damaged("Len 115 of 116", 2, length=115)
        self.damaged("Len 2016 of 2016", 7, on_wire=2016)
        self.damaged("Len 8", 2, length=8, on_wire=8)

    def test_credits(self):
        self.damaged("1 credits were taken back", 3, bufs=6)
        messages = sound_messages()
        messages[1].bufs = 3
        for m in messages[2:]:
            m.bufs = 3 if m.side == ANSWERER else 8
        w.check_lane(w.Lane(messages[:18]))
        self.refused("payload with 2 credits", w.Lane(messages))
        self.damaged("an update that grants nothing", 22, bufs=3)

    def test_buffers_are_used_up_only_behind_a_wish(self):
        def lane(first, answered):
            sound = sound_messages()[:-2]
            asked, last = (m.mseq for m in sound[-2:])
            for n in range(1, 6):
                sound.append(Message(90 + n, DIALLER, first if n == 1 else DATA, 0, 8, 16, asked + n, last + (answered and n > 3), 16))
                if answered and n == 2:
                    sound.append(Message(92, ANSWERER, w.CH_RCV_BUF_ACK, 0, 8, 20, last + 1, asked + 2, 20))
            return sound
        w.check_lane(w.Lane(lane(w.CH_RCV_BUF, False)))
        self.refused("grants nothing", w.Lane(lane(0x04, False)))
        w.check_lane(w.Lane(lane(w.CH_RCV_BUF, True)[:-1]))
        self.refused("grants nothing", w.Lane(lane(w.CH_RCV_BUF, True)))

    def test_control_keeps_a_credit(self):
        messages = sound_messages()
        messages[1].bufs = 3
        for m in messages[2:]:
            m.bufs = 3 if m.side == ANSWERER else 8
        last = messages[17]  # the dialler's eighth: one credit less with each message that is not answered
        more = [Message(90 + n, DIALLER, w.DISCONN, 0, 8, 16, last.mseq + n, last.mseqack, 16) for n in (1, 2, 3)]
        more[1].mid = more[2].mid = 0x04
        messages = messages[:18] + more
        w.check_lane(w.Lane(messages[:19]))
        self.refused("control with 1 credits", w.Lane(messages[:20]))
        messages[19].bufs = messages[20].bufs = 9  # grants: the last credit may be used, but no other
        w.check_lane(w.Lane(messages[:20]))
        self.refused("control with 0 credits", w.Lane(messages))

    def test_greeting(self):
        self.damaged("Hello comes first", 0, side=ANSWERER)
        self.damaged("Hello comes first", 0, length=92)
        self.damaged("HelloAck comes second", 1, mid=w.HELLO)
        self.damaged("outside the numbering", 0, mseq=1)
        self.damaged("Len 24 of 196", 1, on_wire=196)
        self.damaged("a second Hello", 5, mid=w.HELLO_ACK)
        for name, text, why in (("majv", "0x01", "version"), ("cap", "0x01", "capabilities"), ("maxadverts", "0", "no adverts"),
                                ("ipv", "0x05", "IP version"), ("localport", "0", "no port"),
                                ("localrcvsz", "16", "hold no payload"),
                                ("src_ip", "1::2", "no IPv4"), ("dst_ip", "1::2", "no IPv4")):
            self.damaged(why, 0, hello={**SAID, name: text})
        short = dict(SAID)
        del short["extmaxadverts"]
        self.damaged("cut short", 0, hello=short)
        self.damaged("116 bytes for buffers of 100", 0, hello={**SAID, "localrcvsz": "100"})

    def test_end(self):
        self.damaged("a second DisConn", 21, mid=w.DISCONN, length=16, on_wire=16)
        self.damaged("payload after DisConn", 4, mid=w.DISCONN, length=16, on_wire=16)

    def test_roce(self):
        messages = sound_messages()
        lanes, offered = w.roce_lanes(roce_rows(messages))
        self.assertEqual(([lane.messages for lane in lanes], offered), ([messages], {5001}))

    def test_roce_packets_sent_again(self):
        messages = sound_messages()
        rows = roce_rows(messages)
        for at in range(5, len(rows)):  # one is lost beyond the capture; its sender goes back
            mine = [r for r in rows[at:at + 6] if r["ip.src"] == rows[at]["ip.src"]]
            lanes, _ = w.roce_lanes(rows[:at + 6] + mine + rows[at + 6:])
            self.assertEqual(lanes[0].messages, messages)
            # Or one is lost before it: what comes too early is not taken.
            lanes, _ = w.roce_lanes(rows[:at] + mine[1:] + rows[at:])
            self.assertEqual(sorted(lanes[0].messages, key=lambda m: m.frame), messages)

    def test_roce_damaged(self):
        rows = roce_rows(sound_messages())
        again = dict(rows[5])
        again["infiniband_sdp.bsdh.mseq"] = "0x63"
        for damage, why in ((rows[:7] + [rows[7], again] + rows[8:], "with another message"),
                            ([rows[0], *rows[2:]], "without its request"),
                            (rows[:2] + rows[3:], "of which no REQ and REP spoke"),
                            ([{**rows[1], "infiniband.cm.req.serviceid": "0x01061389"}, *rows], "not of RDMA_PS_IB"),
                            (rows[:6] + [{**rows[6], **dict.fromkeys(w.SDP_FIELDS, "")}] + rows[7:], "does not decode"),
                            (rows + [{**rows[6], "infiniband.bth.opcode": "5"}], "none of ours"),
                            (rows[:7], "does not end")):
            with self.assertRaisesRegex(Violation, why):
                w.roce_lanes(damage)

    def test_iwarp(self):
        messages = sound_messages()
        for merged in (False, True):
            self.assertEqual([lane.messages for lane in w.iwarp_lanes(iwarp_rows(messages, merged=merged))], [messages])

    def test_iwarp_damaged(self):
        rows = iwarp_rows(sound_messages())
        undecoded = {**rows[2], **dict.fromkeys(w.SDP_FIELDS, "")}
        for damage, why in ((rows[:2] + rows[3:], "DDP message 3 after 1"), (rows[:4] + rows[5:], "begins inside"),
                            (rows[:3] + rows[4:], "a segment of DDP message"), (rows[:4], "does not end"),
                            (rows[:2] + [undecoded] + rows[3:], "does not decode")):
            with self.assertRaisesRegex(Violation, why):
                w.iwarp_lanes(damage)

    def test_anchor(self):
        here, there = (HERE, 5001), (THERE, 40000)
        rows = [tcp_row(1, there, here, 0, 0), tcp_row(2, there, here, 1, 100), tcp_row(3, here, there, 1, 10),
                tcp_row(4, here, there, 1, 10), tcp_row(9, there, here, 1, 100)]  # these two come again
        anchor = w.anchors(rows)[frozenset((here, there))]
        self.assertEqual((anchor.bytes, anchor.last_frame), ({here: 10, there: 100}, {here: 3, there: 2}))
        lane = w.Lane(sound_messages())
        w.check_anchor(anchor, lane, here, 2)
        late = w.anchors(rows + [tcp_row(12, there, here, 101, 1)])[frozenset((here, there))]
        w.check_anchor(late, lane, here, 8)  # what TCP had taken before may come late
        with self.assertRaisesRegex(Violation, "TCP brings bytes beside the lane"):
            w.check_anchor(late, lane, here, 2)


if __name__ == "__main__":
    sys.exit(unittest.main())
