"""One module a program; each has CASES."""
import collections

# name     of the test
# run      takes a harness.Run, returns what must be equal over TCP and SDP
# share    lanes must carry this part of the stream at least; None: connections too short to be worth a lane
# payload  bytes that the case sends at the very least
Case = collections.namedtuple("Case", "name run share payload", defaults=(0.9, 0))
