/* Two peers, each with something to send: the rules of credits (sdp/credit.hpp) and of Read ZCopy in Combined mode (sdp/adverts.hpp),
 * for spin. Every order in which messages arrive, programs read, adverts are cancelled and refused is tried.
 *
 * Proved for the bounds given by -D: no state in which nobody can go on before everything has arrived; no unit lost, doubled or out of
 * order; no read of memory that its owner has back; no message into a peer that has no buffer for it.
 *
 *   UNITS       what each side sends; a Data and the part in line of an advert carry one
 *   BUFS        receive buffers of each side
 *   STOPS       how often each side cancels its advert or refuses the peer's, by whim
 *   SEND_FIRST  programs read only when all is sent: two large blocking sends that meet (UNITS <= BUFS - 3, what fits into Data)
 *   BREAK       leaves a rule out, to see that it is needed: 1 crossing, 2 the last credit's, 3 waiting for SendSm after a cancel,
 *               4 an update for a peer that has one credit left and nothing to grant
 *
 * Counters are kept relative, as messages under way, so that they are bounded: credits = Bufs - messages the peer had not taken when it
 * sent them. run_models runs it.
 */
#ifndef UNITS
#define UNITS 3
#endif
#ifndef BUFS
#define BUFS 4
#endif
#ifndef STOPS
#define STOPS 1
#endif
#ifndef BREAK
#define BREAK 0
#endif
#define OTHER (1 - me)

mtype = { data, src_avail, rd_compl, send_sm, src_cancel, update };

/* To each peer: kind, first unit (data, src_avail) or units (rd_compl), length, messages newly taken, Bufs. */
chan to[2] = [BUFS] of { mtype, byte, byte, byte, byte };

byte may_send[2];  /* credits */
byte unacked[2];   /* messages of ours that the peer had not taken when it last spoke */
byte posted[2], told[2], taken[2];
bool heard[2];     /* something else than an update since our last message */

byte sent[2];      /* units of ours that are the peer's */
byte open_end[2];  /* one behind the advertised; 0: nothing open */
bool cancel_due[2], cancel_sent[2];

byte got[2];
byte queue_first[2], queued[2];  /* units in private buffers, in order */
byte sink_at[2], sink_end[2];    /* what may be read of the peer's memory; sink_end 0: nothing */
bool reading[2], cancelled[2];
byte report[2];
bool sm_due[2];
byte stops[2];

#define GRANTS(p) (posted[p] > told[p])
#define PAYLOAD(p) (may_send[p] > 2)
#if BREAK == 2
#define CONTROL(p) (may_send[p] >= 1)
#else
#define CONTROL(p) (may_send[p] >= 2 || (may_send[p] == 1 && GRANTS(p)))
#endif
#if BREAK == 4
#define LOW(p) (told[p] == 0)
#else
#define LOW(p) (told[p] == 0 || (told[p] == 1 && heard[p]))
#endif
#define UPDATE(p) (may_send[p] >= 1 && GRANTS(p) && (posted[p] <= 3 -> LOW(p) : (told[p] > 2 -> told[p] + told[p] / 2 : told[p]) < posted[p]))
#define ALL_SENT(p) (sent[p] == UNITS && open_end[p] == 0)
#define DONE(p) (ALL_SENT(p) && got[p] == UNITS)
#ifdef SEND_FIRST
#define READS(p) ALL_SENT(p)
#else
#define READS(p) true
#endif

inline post(what, first, units) {
  assert(may_send[me] > 0 && nfull(to[OTHER]));
  to[OTHER]!what(first, units, taken[me], posted[me]);
  may_send[me]--;
  unacked[me]++;
  taken[me] = 0;
  told[me] = posted[me];
  heard[me] = false
}

inline home() { posted[me]++ }

inline over() {
  open_end[me] = 0;
  cancel_due[me] = false;
  cancel_sent[me] = false
}

inline drop() { /* the sink takes no more of what is open */
  if
  :: sink_end[me] != 0 -> sink_end[me] = 0; sm_due[me] = true
  :: else
  fi;
  cancelled[me] = false
}

inline take() {
  to[me]?kind(a, b, n, bufs);
  posted[me]--;
  told[me]--;
  taken[me]++;
  unacked[me] = unacked[me] - n;
  assert(bufs >= unacked[me]);
  may_send[me] = bufs - unacked[me];
  heard[me] = heard[me] || kind != update;
  if
  :: kind == data ->
     assert(sink_end[me] == 0);
     if :: queued[me] == 0 -> queue_first[me] = a :: else fi;
     assert(queue_first[me] + queued[me] == a);
     queued[me]++
  :: kind == src_avail ->
     assert(sink_end[me] == 0 && !sm_due[me] && !cancelled[me]);
     if :: queued[me] == 0 -> queue_first[me] = a :: else fi;
     assert(queue_first[me] + queued[me] == a);
     queued[me]++;
     sink_at[me] = a + 1;
     sink_end[me] = a + b;
#if BREAK != 1
     if :: open_end[me] != 0 && !cancel_sent[me] -> cancel_due[me] = true :: else fi
#endif
  :: kind == rd_compl ->
     home();
     if
     :: open_end[me] == 0
     :: else ->
        assert(sent[me] + a <= open_end[me]);
        sent[me] = sent[me] + a;
        if :: sent[me] == open_end[me] -> over() :: else fi
     fi
  :: kind == send_sm -> home(); if :: open_end[me] != 0 -> over() :: else fi
  :: kind == src_cancel -> home(); if :: reading[me] -> cancelled[me] = true :: else -> drop() fi
  :: kind == update -> home()
  fi;
  kind = data; a = 0; b = 0; n = 0; bufs = 0
}

proctype Peer(byte me) {
  mtype kind = data;
  byte a, b, n, bufs;
  do
  :: atomic { nempty(to[me]) -> take() }
  :: atomic { sent[me] < UNITS && open_end[me] == 0 && PAYLOAD(me) -> post(data, sent[me], 1); sent[me]++ }
  :: atomic { sent[me] + 2 <= UNITS && open_end[me] == 0 && sink_end[me] == 0 && PAYLOAD(me) ->
       if
       :: a = 2
       :: sent[me] + 3 <= UNITS -> a = 3
       fi;
       post(src_avail, sent[me], a);
       open_end[me] = sent[me] + a;
       sent[me]++;
       a = 0 }
  :: atomic { open_end[me] != 0 && !cancel_due[me] && !cancel_sent[me] && stops[me] < STOPS -> stops[me]++; cancel_due[me] = true }
  :: atomic { sink_end[me] != 0 && !reading[me] && !cancelled[me] && stops[me] < STOPS -> stops[me]++; drop() }
  /* control, in the order of next() */
  :: atomic { report[me] != 0 && CONTROL(me) -> a = report[me]; report[me] = 0; post(rd_compl, a, 0); a = 0 }
  :: atomic { report[me] == 0 && sm_due[me] && CONTROL(me) -> sm_due[me] = false; post(send_sm, 0, 0) }
  :: atomic { cancel_due[me] && CONTROL(me) -> cancel_due[me] = false; cancel_sent[me] = true; post(src_cancel, 0, 0);
#if BREAK == 3
       over()
#endif
     }
  :: atomic { UPDATE(me) -> post(update, 0, 0) }
  /* the program reads */
  :: atomic { READS(me) && queued[me] > 0 -> assert(queue_first[me] == got[me]); got[me]++; queue_first[me]++; queued[me]--; home() }
  :: atomic { READS(me) && queued[me] == 0 && sink_end[me] != 0 && !reading[me] -> reading[me] = true }
  :: atomic { reading[me] ->
       assert(open_end[OTHER] != 0 && sink_at[me] < open_end[OTHER]);
       assert(sink_at[me] == got[me]);
       reading[me] = false;
       got[me]++;
       sink_at[me]++;
       report[me]++;
       if :: sink_at[me] == sink_end[me] -> sink_end[me] = 0 :: else fi;
       if :: cancelled[me] -> drop() :: else fi }
  :: DONE(0) && DONE(1) -> break
  od
}

init {
  byte i;
  atomic {
    for (i : 0 .. 1) { may_send[i] = BUFS; posted[i] = BUFS; told[i] = BUFS }
    i = 0;
    run Peer(0);
    run Peer(1)
  }
}
