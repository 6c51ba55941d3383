"""One module a program; each has PROGRAM, its name and the Debian packages of the case, the first of which gives the version, and CASES."""
import collections

# name     of the test
# run      takes a harness.Run, returns what must be equal over TCP and SDP
# what     is exercised, for the table of the README
# share    lanes must carry this part of the stream at least, on one host; None: connections too short to be worth a lane, or without one
# payload  bytes that the case sends at the very least
# unread   bytes that its readers may leave at the end, besides a tenth of all
# unseen   bytes by TCP on connections that the library does not follow: inherited by a program that was executed
# lanes    ends of connections that have one at the very least: where none is over before its lane can be up
# extra    large or long: run by scripts/programs, not with every test
Case = collections.namedtuple("Case", "name run what share payload unread unseen lanes extra",
                              defaults=(0.9, 0, 0, 0, 2, False))
