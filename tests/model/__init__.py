"""A model of the coherence rules, explored in every order of events.

**The guarantee.** If Delete answered before a verify of the token began, on any server process or
in any client, that verify does not answer VALID.

Leases provide it (Gray and Cheriton, 1989): a verifier answers from its cache only under a lease,
and Delete waits until each leaseholder has acknowledged the deletion or its lease has expired. This
model explores the rules, not the code that implements them. It consists of plain functions over
small tuples. The explorer applies them in every order in which messages can be delayed or lost, and
processes can pause, die and restart.

**The rules**, as the model implements them (docs/protocol.md explains them). T is the length of a
lease, and ρ the largest difference between clock rates.

1.  Every change that can turn VALID into another verdict takes the next revision from one counter
    row, locks the row until it commits, and names its token in a log under that revision. So
    revisions follow the order of commits, without gaps.
2.  A server process commits its row before it reads anything, and begins with an empty cache.
3.  To renew, a server reads its clock (t0), then sends one statement to one database. The statement
    updates the server's row if the history there contains the position applied so far (rule 12),
    and returns the log after it. The server applies the log. If the update changed exactly one row
    and its commit is as durable as a deletion's, the lease ends at t0 + T(1−ρ). If no row was
    updated, the row or the history is lost: the server empties its cache, ends its lease, resets
    its clients and registers again. Registering alone gives no lease. The row acknowledges the
    position that was applied before the statement.
4.  A verdict carries the revision q of the snapshot that it was read in. It holds at revision p if
    q ≥ p, or if the cache knows all names in (q, p], has not trimmed any, and none is the token's.
    It may enter a cache, or answer a call other than the one that sent the look-up, only if it
    holds at the revision applied when it arrives. It may answer its own call if it holds at the
    revision applied when the call began. UNKNOWN is never cached and never shared.
5.  Every answer requires a lease, checked against a clock that was read after the call began and
    before the cache was. The same applies to a call that shares another call's look-up.
6.  A client that watches a server sends the position that it has applied, and requests a sub-lease
    in the same message. The server sends the invalidations since then (or a Reset, if it does not
    know the position), and all later ones as it applies them. A grant follows the invalidations
    that it depends on, and is no longer than the server's own lease. For the client, the grant
    lasts for duration × (1−ρ), from before it sent the request. For the server, it lasts for
    duration × (1+2ρ), from before it sent the grant, even if the stream breaks. The server sends a
    grant only if the client has confirmed the whole log that the server's last renewal returned.
7.  A server acknowledges a revision in its row once it has applied it, and each recorded grant has
    expired or its client has confirmed the revision.
8.  Delete answers when every existing row has acknowledged its revision, or T(1+ρ) after its
    commit. When called again, it makes another durable commit and waits again. A change that finds
    itself made waits only after a durable commit on a history with the position of that read.
9.  A watcher that has seen a row's `renewal` unchanged for T(1+ρ) may remove the row, if `renewal`
    is still the same. A server that shuts down removes its own row once it has stopped answering
    and no client holds a sub-lease of it. A row belongs to one process, and a new process never
    takes over another's row.
10. A notification makes a renewal happen early. It does not replace one.
11. The log keeps all entries that some row has not acknowledged. A reader whose applied position
    precedes the first entry empties its cache.
12. A revision is a number in one history, so each has a random mark. A revision and its mark are a
    position, and holders of the same position share everything before it. Every log read states the
    position applied so far. Every verdict, message on a stream and read of the rows counts only if
    its position is known. After the loss of a row or history, a server registers without
    acknowledging anything while a grant may run. A Reset empties a client's cache, ends its lease
    and its other streams, and voids its earlier requests. A log read or a verdict of another
    timeline than the lease's does not count; only a renewal adopts a timeline. NOT_FOUND requires a
    lease, and a read of a standby or of another timeline is rejected.
13. For a token with a rate limit, a verifier answers VALID only by spending a call that the token's
    bucket has issued, each call once. A call can be spent for a second, counted from before the
    question was sent. Its answer counts only under a lease on the history of the database that
    issued it. A verifier begins with no calls.

**Where to begin.** server.py models rules 1-5 and 8-11 inside one process. watch.py models clients
and streams, histories.py a process between two databases with different histories, management.py
tokens that only one of the databases has, and moves.py a client that moves between two servers on
different histories. rates.py models rule 13, which has another promise: a bound on how often a
token with a rate limit is accepted. explore.py takes their actions in every order. broken.py and
rule_12.py break one rule at a time, and each time the explorer finds an order that violates the
guarantee:

    python -m tests.model                   # states, seconds, and steps to each violation
    python -m tests.model "counted from"    # the steps, for broken rules with that name

**What only it shows**: that the rules suffice in every order of steps, and that each is needed.

**What it does not show**: that the code follows the rules, and that Postgres behaves as assumed.
The model has one token (and changes that name another) and one Delete, and T is two or three ticks.

**Other changes that narrow a token** (Update, Disable, Rotate, RetireSecrets, RevokeSecret and
DeleteAll) differ from Delete in two ways. A call that is repeated reads the token first, and
confirms the change that it finds there: histories.py has that. And a later change may make the
token VALID again. Then VALID is correct from that change's commit on, and the guarantee for the
narrowing says nothing about it. Otherwise they are the same: each takes a revision, names its
tokens in the log and waits by rule 8, and a verdict that was read before it is outdated for the
same reasons. What it changes does not matter: a cache drops all that it knows of a named token.
"""
