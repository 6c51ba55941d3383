"""What can be told without a machine: that the programs' output, as recorded, gives the figures that it shows, and what a table makes of
them."""
from lib import figures, guest, programs, smc
from lib.runs import Broken

LATENCY = """---------------------------------------------------------------------------------------
 remote address: LID 0000 QPN 0x0012 PSN 0x3e260b
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:10:77:00:01
---------------------------------------------------------------------------------------
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec]
 64      1000          45.22          124172.04      124.44   	       500.00     	6285.36		40069.40 		124172.04
---------------------------------------------------------------------------------------
"""
BANDWIDTH = """ #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 65536      500              16.68              4.00   		   0.000061
---------------------------------------------------------------------------------------
"""


def is_refused(read, output):
    try:
        read(output)
    except Broken:
        return True
    return False


def round_of(tcp, rsockets, sdp):
    runs = {"kernel TCP": tcp, "librspreload": rsockets, "SDP": sdp}
    return {name: {"figures": [figure], "lane_share": 1.0} for name, figure in runs.items() if figure is not None}


def run():
    assert guest.read_latency(LATENCY) == [1000.0]  # a second, by twice 500 us
    assert guest.read_bandwidth(BANDWIDTH) == [4 * 8 * (1 << 20) / 1e6]
    assert programs.read_netperf("1746.35\n") == [1746.35]
    for read in (guest.read_latency, guest.read_bandwidth, programs.read_netperf):
        assert is_refused(read, "connection refused\n"), read.__name__
    assert is_refused(guest.read_latency, LATENCY + LATENCY)

    nested = smc.attribute(1, b"\5\0\0\0") + smc.attribute(2, "four")
    assert len(nested) % 4 == 0
    assert smc.attributes(nested) == {1: b"\5\0\0\0", 2: b"four\0"}
    assert smc.attributes(smc.attribute(3 | 0x8000, nested))[3] == nested

    rr = next(test for test in guest.tests().values() if test.kind == "RR")
    row = guest.summarise("rxe RR", rr, [round_of(100, 50, 60), round_of(200, 50, 80), round_of(100, None, 10)])
    assert row["ratios"]["librspreload"]["of_rounds"] == [1.2, 1.6]  # of the rounds that have both
    assert row["ratios"]["kernel TCP"]["median"] == 0.4
    assert "bare verbs" not in row["ratios"]
    cells = dict(zip(guest.HEADINGS, guest.cells(row)))
    assert cells["SDP : librspreload"] == "1.40x (1.20..1.60) met", cells
    assert cells["bare verbs"] == "" and cells["on lanes"] == "100%"
    assert figures.markdown_table([["a", "b"], ["c", "1"]], 1) == "| a | b |\n|---|--:|\n| c | 1 |"
    print("self-test: fine")
    return 0
