"""When Delete returns, the token is dead everywhere: the rules for that, tried in every order.

**The guarantee.** If Delete answered before a verify of the token began, on any server process or
in any client, that verify does not answer VALID.

It is kept with leases (Gray and Cheriton, 1989): a verifier answers from memory only under a lease,
and Delete waits until each leaseholder has acknowledged the deletion or its lease has run out. This
model explores the rules, and not the code that follows them: plain functions over small tuples, in
every order in which messages can be delayed or lost, and processes can pause, die and return.

**The rules**, with T for the lease length and ρ for the largest difference of clock rates:

1.  Every change that can turn VALID into something else takes the next revision from one counter
    row, locked until it commits, and names its token in a log under that revision. So the order of
    revisions is the order of commits, without gaps.
2.  A server process commits its row before it reads anything, and begins with an empty memory.
3.  To renew, it reads its clock (t0), then sends one statement to one database. The statement
    updates its row on condition that the history there contains the position applied so far (see
    12), and returns the log after it. The process applies the log, and its lease runs to t0 +
    T(1−ρ), if the update touched exactly one row and its commit is as durable as a deletion's. If
    no row was touched, row or history is lost: it empties its memory, its lease ends, it resets its
    clients and registers again. Registering alone gives no lease. The row acknowledges what was
    applied before the statement.
4.  A verdict carries the revision q of the snapshot that it was read in. It holds at revision p if
    q ≥ p, or if nothing in (q, p] names its token, and that is known: the memory has not trimmed
    what q lacks. It may enter a memory, or answer a call that did not send it, only if it holds at
    what has been applied by then; it may answer its own call if it holds at what had been applied
    when the call began. UNKNOWN never enters and is never shared.
5.  Every answer is given under a lease, by a clock read after the call began and before memory is
    looked into. The same holds for a call that shares another's look-up.
6.  A client that watches a server sends what it has applied, and asks for a sub-lease with it. The
    server sends it what became invalid since then (or a Reset, if the server does not know), and
    everything that it applies from then on. A grant follows everything that it presupposes and is
    no longer than the server's own lease. The client counts it from before it sent the request that
    the grant answers, for duration × (1−ρ). The server records it for duration × (1+2ρ), from
    before it is sent until its end, even if the stream breaks. A grant requires that the client
    has confirmed all of the log that the renewal behind the server's lease returned.
7.  A server acknowledges a revision in its row once it has applied it, and each client on record
    has confirmed it or the client's record has ended.
8.  Delete answers when every existing row has acknowledged its revision, or T(1+ρ) after its
    commit. Called again, it commits as durably again, and waits again.
9.  A watcher that has seen a row's `renewal` unchanged for T(1+ρ) may remove it, if it still is the
    same.
    A server that shuts down removes its own row once it has stopped answering and no client holds a
    sub-lease of it. A row belongs to one process, and a new process never takes over another's row.
10. A notification makes a renewal happen early. It does not replace one.
11. The log keeps what is not acknowledged. A reader that has applied less than where it starts
    empties its memory.
12. A revision is a number in one history, so each carries a random mark. Revision and mark are a
    position, and holders of the same position share everything before it. Every log read states
    the position applied so far. Every verdict, message on a stream and read of the rows counts only
    where its position is known. After a loss of row or history the process registers with nothing
    acknowledged while a grant may run. A Reset empties a client's memory, ends its lease and its
    other streams, and voids the requests that it sent before. A log read or a verdict of a timeline
    that the lease does not stand on counts for nothing; only a renewal adopts a timeline. NOT_FOUND
    needs a lease, and neither a standby nor another timeline is believed.

**Where to begin**: server.py is rules 1–5 and 8–11 inside one process, watch.py is clients and
streams. histories.py is a process between two databases with different histories, management.py the
tokens that only one of them has, moves.py a client that moves between two servers on different
histories. explore.py takes their actions in every order. broken.py and rule_12.py break one rule
after another, and each time the explorer finds an order that violates the guarantee:

    python -m tests.model                   # states, seconds, and steps to each violation
    python -m tests.model "counted from"    # the steps, for broken rules with that name

**What it cannot show**: that the code follows the rules, and that Postgres behaves as
assumed. It has one token (and changes that name another), one Delete, and T is two or three ticks
long.
"""
