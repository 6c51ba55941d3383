"""One module a program; each has CASES."""
import collections

# name     of the test
# run      takes a harness.Run, returns what must be equal over TCP and SDP
# share    lanes must carry this part of the stream at least, on one host; None: connections too short to be worth a lane
# payload  bytes that the case sends at the very least
# unread   bytes that its readers may leave at the end, besides a tenth of all
# lanes    ends of connections that have one at the very least: where none is over before its lane can be up
Case = collections.namedtuple("Case", "name run share payload unread lanes", defaults=(0.9, 0, 0, 2))
