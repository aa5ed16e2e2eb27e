"""When Delete returns, the token is dead everywhere: the rules for that, tried in every order.

**The guarantee.** If Delete answered before a verify of the token began, on any server process or
in any client, that verify does not answer VALID.

It is kept with leases (Gray and Cheriton, 1989): a verifier answers from memory only under a lease,
and Delete waits until each leaseholder has acknowledged the deletion or its lease has run out. What
is explored here are the rules, not the code that follows them: plain functions over small tuples,
in every order in which messages can be slow or lost, and processes stop, die and come back.

**The rules**, with T for the lease length and ρ for how much clock rates may differ:

1.  Every change that can turn VALID into something else takes the next revision from one counter
    row, locked until it commits, and names its token in a log under that revision. So the order of
    revisions is the order of commits, without gaps.
2.  A server process commits its row before it reads anything, and begins with an empty memory.
3.  To renew, it reads its clock (t0), then reads the log up to head and applies it (drops what it
    names), then updates its row. Its lease runs to t0 + T(1−ρ), if that touched exactly one row; if
    not, it empties its memory, ends its clients' streams, and registers anew. Registering alone
    gives no lease: the head that it read may be old by the time that its row can be seen. Log and
    row go over one connection, and the commit is as durable as a deletion's.
4.  A verdict carries the revision q of the snapshot that it was read in. It holds at revision p if
    q ≥ p, or if nothing in (q, p] names its token, and that is known: the memory has not trimmed
    what q lacks. It may enter a memory, or answer a call that did not send it, only if it holds at
    what has been applied by then; it may answer its own call if it holds at what had been applied
    when the call began. UNKNOWN never enters, nor is shared.
5.  Every answer is given under a lease, by a clock read after the call began and before memory is
    looked into. That goes for whoever shares another's look-up as well.
6.  A client that watches a server sends what it has applied, and asks for a sub-lease with it. The
    server tells it what is invalid since then (or to empty its memory, if it does not know), and
    all that it applies from then on; a grant comes after all that it presupposes and is no longer
    than the server's own lease. The client counts it from before it sent the very request that it
    answers, for duration × (1−ρ). The server has it on record for duration × (1+2ρ), from before
    it goes out until its end, whatever becomes of the stream.
7.  A server acknowledges a revision in its row once it has applied it and each client that it has
    on record has said that it has applied it, or its record has ended.
8.  Delete answers when every row that is there has acknowledged its revision, or T(1+ρ) after its
    commit. Called again, it waits again.
9.  Whoever has seen a row's `renewal` unchanged for T(1+ρ) may remove it, if it still is unchanged.
    A server that shuts down removes its own once it has stopped answering and no client holds a
    sub-lease of it. A row is one process's: one that starts takes over no other's.
10. A notification makes a renewal early. It does not stand for one.
11. The log keeps what is not acknowledged. A reader that has applied less than where it starts
    empties its memory.

**Where to begin**: server.py is rules 1–5 and 8–11 inside one process, watch.py is clients and
streams, failover.py a process left behind with a deposed primary. explore.py takes their actions in
every order. broken.py breaks one rule after the other, and each time an order is found in which the
guarantee falls:

    python -m tests.model                   # states and seconds; broken rules, in how many steps
    python -m tests.model "counted from"    # the steps, where a broken rule is named like that

**What it cannot show**: that the code follows the rules, and that Postgres does what is assumed of
it. It has one token (and changes that name another), one Delete, and T is two or three ticks long.
"""
