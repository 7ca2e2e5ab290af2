/* How Latchkey opens, refreshes and ends the sessions of one user: store.go and session.lua in
   Promela, for the model checker spin. README.md says how to read it and what it does not prove.
   `check` runs it in several configurations; `faults` shows that it notices mistakes.

   spin tries every order in which the processes below can take their steps. A step is one
   statement, or one atomic or d_step block: what the real stores do as one, an SQL statement or a
   Redis script.

   A configuration is a set of -D flags:

       LOGINS=n     sessions 1 to n are opened by logins (at most 2)
       REFRESH_0=n  how often session 0 is refreshed (at most 4); REFRESH_1 and REFRESH_2 likewise
       SIGNUP       session 0 is opened by a signup; without it, it is open when the run begins
       REVOKE=s     somebody revokes session s, or all sessions
       CHANGE       session 0 changes the password; CHANGE_1: session 1 does, too
       REHASH       the hash of the password is replaced by one of another cost
       RESET        a mailed link resets the password; RESET_1: another link does, too
       DELETE       the user deletes the account
       SQL          an operator replaces the hash, or deletes the row, by plain SQL
       DISABLE      an operator disables the user; DISABLE=2: so does another
       SQL_DISABLE  an operator disables the user by plain SQL
       ENABLE       an operator enables the user, in whatever way
       CLOCK=n      n times, at any moment, the leeway of all exchanged tokens runs out
       FORGET       Redis loses the blacklist keys of session 0, at any moment
       RESEND       REFRESH_REUSE_POLICY=resend */

#ifndef LOGINS
#define LOGINS 0
#endif
#ifndef REFRESH_0
#define REFRESH_0 0
#endif
#ifndef REFRESH_1
#define REFRESH_1 0
#endif
#ifndef REFRESH_2
#define REFRESH_2 0
#endif
#ifndef CLOCK
#define CLOCK 0
#endif
#ifndef DISABLE
#define DISABLE 0
#endif
#ifdef RESEND
#define RESENDS true
#else
#define RESENDS false
#endif

#define SESSIONS 3
#define TOKENS   5              /* a session's tokens are 1 to TOKENS, in order of their birth */
#define NOBODY   SESSIONS

/* Sets of small numbers. */
#define has(set, x) (((set) >> (x)) & 1)
#define add(set, x) set = (set) | (1 << (x))
#define ALL         255

/* The hashes that the row can hold. A digest is the number of its hash. Each hash is that of a
   password of its own, but for REHASHED. */
#define OLD      0
#define NEW      1              /* of the change by session 0 */
#define NEWER    2              /* of the change by session 1 */
#define OPERATOR 3              /* of plain SQL */
#define REHASHED 4              /* of the old password, at another cost */
#define NO_ROW   5              /* there is no such user */
#define MAILED   6              /* of a reset by a mailed link */
#define MAILED_1 7              /* of the reset by another link */
#define password(h) (h == REHASHED -> OLD : h)


/* ---- PostgreSQL: one row and its lock ---- */

byte hash = OLD;                /* what is committed: all that a plain read sees */
bool disabled = false;          /* likewise: an operator keeps the user from logging in */
byte sharers = 0;               /* transactions that hold the row's share lock */
bool exclusive = false;         /* whether one holds its exclusive lock */

/* SELECT password_hash, disabled_at … FOR SHARE */
inline select_for_share(into, is_disabled, locked) {
	atomic { !exclusive -> sharers++; into = hash; is_disabled = disabled; locked = true }
}

/* UPDATE … or DELETE … WHERE password_hash = checked. Its effect is seen when it commits. */
inline lock_if_unchanged(checked, locked) {
	atomic {
		!exclusive && sharers == 0;
		locked = (hash == checked);
		exclusive = locked
	}
}

/* UPDATE …, whatever the hash is. */
inline lock_if_there(locked) {
	atomic {
		!exclusive && sharers == 0;
		locked = (hash != NO_ROW);
		exclusive = locked
	}
}

/* A transaction may end in the middle: its connection breaks, or the server rolls it back since
   Redis did not answer in time. The script that was sent may still be carried out, when the lock is
   gone. But then nothing is committed any more. */
inline perhaps_lose_share(locked) {
	if
	:: true
	:: atomic { locked -> locked = false; sharers-- }
	fi
}

inline perhaps_lose_exclusive(locked) {
	if
	:: true
	:: atomic { locked = false; exclusive = false }
	fi
}


/* ---- Redis: session:{user}:<sid> and blacklist:{user}:<jti> ---- */

typedef Session {
	bool alive;             /* the key is there */
	byte digest;            /* of the password hash that it is bound to */
	byte token;             /* the current refresh token */
	byte previous;          /* the token exchanged last */
	bool recently;          /* that was within the leeway */
	byte blacklist;         /* set of tokens: their blacklist keys are there */

	/* Outside of the server. */
	byte known;             /* set of tokens: they were handed out */

	/* What happened, for the assertions only. No decision of the protocol reads it. */
	bool begun;             /* it was started */
	bool over;              /* it was ended, for good */
	byte last;              /* the last token of its chain */
	byte last_but_one;
	byte successor[TOKENS + 1];     /* by token: what was handed out for it, or 0 */
	byte fresh;             /* set of tokens: they were exchanged within the leeway */
	byte opened_with;       /* the password that its holder has shown to know */
}

Session session[SESSIONS];
#define S session[s]

/* What happened to passwords, for the assertions only. */
byte replaced = 0;              /* set: the row has another one now, whoever changed it */
byte cut_off = 0;               /* set: those of them that the server replaced */
byte committed = 1 << OLD;      /* set of hashes: the row has or had them */
byte link_used = 0;             /* set of hashes: a link that was made for one has reset it */
bool shut_out = false;          /* the server has disabled the user, and nobody enabled it since */
bool forgot = false;            /* Redis lost a blacklist */


/* ---- What must hold at every moment ---- */

/* A session that was ended is never back, and none vanishes without a reason. */
#define ends_for_good(s) (session[s].alive == (session[s].begun && !session[s].over))

/* The current token is the end of the session's one chain. */
#define one_chain(s)     (!session[s].alive || session[s].token == session[s].last)

/* From the commit of a password change, a reset or a deletion on, no session of the old password
   lives. A session whose tokens nobody was given does not count. */
#define cut_off_at_once(s) (!session[s].alive || session[s].known == 0 \
				|| !has(cut_off, session[s].opened_with))

/* From the commit of a disabling on, no session lives until the user is enabled. */
#define shut_out_at_once(s) (!session[s].alive || session[s].known == 0 || !shut_out)

#define sound(s) (ends_for_good(s) && one_chain(s) && cut_off_at_once(s) && shut_out_at_once(s))

/* Watch can take its step as soon as something is wrong, and only then. */
active proctype Watch() {
	byte s;
end:	atomic {
		if
		:: !sound(0) -> s = 0
		:: !sound(1) -> s = 1
		:: !sound(2) -> s = 2
		fi;
		assert(ends_for_good(s));
		assert(one_chain(s));
		assert(cut_off_at_once(s));
		assert(shut_out_at_once(s))
	}
}


/* ---- session.lua: each of these is carried out in one step ---- */

mtype = { ROTATED, RESENT, REUSED, THEFT, ENDED, STALE };

inline start(s, h) {
	S.alive = true;
	S.digest = h;
	S.token = 1;

	S.begun = true;
	S.last = 1;
	S.opened_with = password(h)
}

inline revoke(s) {
	S.alive = false;

	S.over = S.begun
}

inline revoke_all_but(keeper) {
	i = 0;
	do
	:: i < SESSIONS && i != keeper ->
		session[i].alive = false;
		session[i].over = session[i].begun;
		i++
	:: i < SESSIONS && i == keeper -> i++
	:: i == SESSIONS -> break
	od;
	i = 0
}

#define in_leeway(s, t) (has(S.blacklist, t) || (S.previous == t && S.recently))

inline rotate(s, shown, h) {
	if
	:: !S.alive -> outcome = ENDED
	:: S.alive && S.token == shown ->
		if
		:: S.digest != h -> outcome = STALE
		:: else ->
			outcome = ROTATED;
			next = S.last + 1;
			add(S.blacklist, shown);
			S.previous = shown;
			S.recently = true;
			S.token = next
		fi
	:: S.alive && S.token != shown ->
		if
		:: !in_leeway(s, shown) -> outcome = THEFT; S.alive = false
		:: in_leeway(s, shown) && !(RESENDS && S.previous == shown) -> outcome = REUSED
		:: in_leeway(s, shown) && RESENDS && S.previous == shown ->
			if
			:: S.digest != h -> outcome = STALE
			:: else -> outcome = RESENT; next = S.token
			fi
		fi
	fi;
	judge(s, shown)
}

/* Is the outcome what the history of the session calls for? Then it becomes part of the history. */
inline judge(s, shown) {
	/* A refresh that read the user after the password was replaced, or the user disabled, gets
	   nothing. */
	assert(!((outcome == ROTATED || outcome == RESENT)
		&& (was_disabled || has(was_replaced, S.opened_with))));
	if
	:: outcome == ROTATED ->
		/* Only the end of the chain is exchanged, so each token once. */
		assert(shown == S.last);
		S.last_but_one = shown;
		S.last = next;
		add(S.fresh, shown)
	:: outcome == RESENT ->
		assert(RESENDS && shown == S.last_but_one && next == S.last && has(S.fresh, shown))
	:: outcome == REUSED ->
		assert(shown != S.last && has(S.fresh, shown));
		assert(!(RESENDS && shown == S.last_but_one))
	:: outcome == THEFT ->
		assert(shown != S.last);
		assert(!has(S.fresh, shown) || (forgot && shown != S.last_but_one));
		S.over = true
	:: outcome == ENDED ->
		assert(S.over)
	:: outcome == STALE ->
		assert(S.alive)
	fi
}


/* ---- store.go ---- */

/* store.createUser */
proctype Signup() {
	byte s = 0;
	d_step { start(s, OLD) }
	if
	:: d_step { hash = OLD; replaced = 0; cut_off = 0 }     /* commit */
		if
		:: add(S.known, 1)                              /* 201, and the tokens */
		:: true                                         /* the commit's answer was lost: 503 */
		fi
	:: true                                                 /* rolled back: 503 */
	fi
}

/* store.openSession, and bcrypt before it: a login into session s, with the password that is right
   when it begins. */
proctype Login(byte s) {
	byte wanted;
	byte checked;
	byte current;
	bool is_disabled;
	byte tries = 0;
	bool locked;

	wanted = password(hash);
again:
	checked = hash;                         /* read without a lock; then bcrypt */
	if
	:: checked == NO_ROW || password(checked) != wanted -> goto done        /* 401 */
	:: else
	fi;
	select_for_share(current, is_disabled, locked);
	if
	:: current != checked ->                /* errStale */
		sharers--;
		tries++;
		if
		:: tries < 3 -> goto again
		:: else -> goto done
		fi
	:: current == checked && is_disabled -> /* errDisabled: 403 */
		sharers--;
		goto done
	:: else
	fi;
	perhaps_lose_share(locked);
	d_step { start(s, checked) }
	if
	:: locked ->
		d_step { assert(!disabled); sharers-- }         /* commit */
		add(S.known, 1)                 /* 200, and the tokens */
	:: locked -> sharers--                  /* the answer of Redis or of the commit was lost: 503 */
	:: !locked                              /* 503 */
	fi;
done:
	skip
}

/* store.refresh: somebody shows any token that was handed out for session s. */
proctype Refresh(byte s) {
	byte shown;
	byte h;
	byte next;
	byte was_replaced;
	bool was_disabled;
	bool locked;
	mtype outcome;

end:	atomic {
		if
		:: has(S.known, 1) -> shown = 1
		:: has(S.known, 2) -> shown = 2
		:: has(S.known, 3) -> shown = 3
		:: has(S.known, 4) -> shown = 4
		fi;
		h = hash;                       /* read without a lock */
		was_disabled = disabled;
		was_replaced = replaced
	}
	if
	:: h == NO_ROW || was_disabled ->
		d_step { revoke(s) }
		outcome = ENDED;
		goto answer
	:: else
	fi;
	d_step { rotate(s, shown, h) }
	if
	:: outcome != STALE -> goto answer
	:: else
	fi;

	/* The second look. */
	select_for_share(h, was_disabled, locked);
	perhaps_lose_share(locked);
	if
	:: h == NO_ROW || was_disabled -> outcome = STALE
	:: else -> d_step { rotate(s, shown, h) }
	fi;
	if
	:: outcome == STALE ->
		perhaps_lose_share(locked);
		d_step {
			/* It ends no session of the password that is right now, unless the user was
			   disabled, or a change that failed has bound it to a hash that never was. */
			assert(!S.alive || S.opened_with != password(hash) || was_disabled
				|| !has(committed, S.digest) || !locked);
			revoke(s)
		}
		outcome = ENDED
	:: else
	fi;
	if
	:: locked -> sharers--
	:: else
	fi;

answer:
	assert(!S.alive || (outcome != ENDED && outcome != THEFT && !was_disabled));
	if
	:: outcome == ROTATED || outcome == RESENT ->
		d_step {
			/* 200. No token ever gets two different successors. */
			assert(S.successor[shown] == 0 || S.successor[shown] == next);
			S.successor[shown] = next;
			add(S.known, next)
		}
	:: true                                 /* 401; or an answer was lost: 503, or silence */
	fi
}

/* store.revoke or store.revokeAll, for somebody who holds session s: logout, and the routes about
   sessions. It also stands for a session's key that expires. Whether its answer arrives changes
   nothing. */
proctype Revoke(byte s) {
	byte i;
end:	S.known != 0;
	if
	:: d_step { revoke(s) }
	:: d_step { revoke_all_but(NOBODY) }
	fi
}

inline commit_change() {
	assert(hash == checked);
	add(replaced, password(hash));
	cut_off = replaced;
	add(committed, new);
	S.opened_with = new;
	hash = new;
	exclusive = false
}

/* store.changePassword by session s, whose holder knows the password that is right when it
   begins. */
proctype Change(byte s; byte new) {
	byte i;
	byte wanted;
	byte checked;
	bool was_alive;
	bool locked;

end:	atomic { S.known != 0 -> wanted = password(hash) }
again:
	checked = hash;
	if
	:: checked == NO_ROW || password(checked) != wanted -> goto done        /* 401 */
	:: else
	fi;
	lock_if_unchanged(checked, locked);
	if
	:: !locked -> goto again                /* errStale */
	:: else
	fi;
	perhaps_lose_exclusive(locked);
	d_step {
		was_alive = S.alive;
		revoke_all_but(s);
		if
		:: S.alive -> S.digest = new
		:: else
		fi;
		assert(S.alive == was_alive)    /* the caller's own session goes on */
	}
	if
	:: locked -> d_step { commit_change() } /* whether its answer arrives or not */
	:: locked -> exclusive = false          /* rolled back: 503 */
	:: !locked                              /* 503 */
	fi;
done:
	skip
}

inline commit_rehash() {
	assert(hash == OLD);
	add(committed, REHASHED);
	hash = REHASHED;
	exclusive = false
}

/* store.rehash, after a login with the old password */
proctype Rehash() {
	byte i;
	bool locked;

	lock_if_unchanged(OLD, locked);
	if
	:: !locked -> goto done
	:: else
	fi;
	perhaps_lose_exclusive(locked);
	d_step {
		i = 0;
		do
		:: i < SESSIONS ->
			if
			:: session[i].alive && session[i].digest == OLD -> session[i].digest = REHASHED
			:: else
			fi;
			i++
		:: i == SESSIONS -> break
		od;
		i = 0
	}
	if
	:: locked -> d_step { commit_rehash() }
	:: locked -> exclusive = false
	:: !locked
	fi;
done:
	skip
}

#define lives(s) (session[s].alive && session[s].known != 0)

inline commit_reset() {
	assert(hash == checked);
	assert(!has(link_used, linked));        /* of the links to one password, one works */
	assert(!lives(0) && !lives(1) && !lives(2));
	add(link_used, linked);
	add(replaced, password(hash));
	cut_off = replaced;
	add(committed, new);
	hash = new;
	exclusive = false
}

/* store.resetPassword, for whoever has a link. A link is bound to the hash that it was made for. */
proctype Reset(byte new) {
	byte i;
	byte linked;
	byte checked;
	bool locked;

	linked = hash;                          /* the mail */
	checked = hash;                         /* and later the link; then bcrypt */
	if
	:: checked == NO_ROW || checked != linked -> goto done  /* 400 invalid_link */
	:: else
	fi;
	lock_if_unchanged(checked, locked);
	if
	:: !locked -> goto done                 /* errStale: 400 invalid_link */
	:: else
	fi;
	perhaps_lose_exclusive(locked);
	d_step { revoke_all_but(NOBODY) }
	if
	:: locked -> d_step { commit_reset() }
	:: locked -> exclusive = false
	:: !locked
	fi;
done:
	skip
}

inline commit_delete() {
	assert(hash == checked);
	hash = NO_ROW;
	replaced = ALL;
	cut_off = ALL;
	exclusive = false
}

/* store.deleteUser */
proctype Delete() {
	byte i;
	byte checked;
	bool locked;

again:
	checked = hash;
	if
	:: checked == NO_ROW -> goto done
	:: else
	fi;
	lock_if_unchanged(checked, locked);
	if
	:: !locked -> goto again
	:: else
	fi;
	perhaps_lose_exclusive(locked);
	d_step { revoke_all_but(NOBODY) }
	if
	:: locked -> d_step { commit_delete() }
	:: locked -> exclusive = false
	:: !locked
	fi;
done:
	skip
}

inline commit_disable() {
	disabled = true;
	shut_out = true;
	exclusive = false
}

/* store.disableUser */
proctype Disable() {
	byte i;
	bool locked;

	lock_if_there(locked);
	if
	:: !locked -> goto done                 /* errNoUser */
	:: else
	fi;
	perhaps_lose_exclusive(locked);
	d_step { revoke_all_but(NOBODY) }
	if
	:: locked -> d_step { commit_disable() }
	:: locked -> exclusive = false
	:: !locked
	fi;
done:
	skip
}


/* ---- The world ---- */

/* An operator at the psql prompt, who knows nothing of sessions. */
proctype Sql() {
	atomic {
		!exclusive && sharers == 0;
		if
		:: hash == NO_ROW
		:: hash != NO_ROW ->
			add(replaced, password(hash)); add(committed, OPERATOR); hash = OPERATOR
		:: hash != NO_ROW ->
			replaced = ALL; hash = NO_ROW
		fi
	}
}

/* An operator who knows the column disabled_at, at the same prompt. */
proctype SqlDisable() {
	atomic { !exclusive && sharers == 0; disabled = (hash != NO_ROW) }
}

/* store.enableUser, or an operator's SQL. It changes only the row, so it is one step. */
proctype Enable() {
	atomic { !exclusive && sharers == 0; disabled = false; shut_out = false }
}

/* REFRESH_REUSE_LEEWAY passes. */
proctype Clock() {
	byte s = 0;
	d_step {
		do
		:: s < SESSIONS -> S.blacklist = 0; S.recently = false; S.fresh = 0; s++
		:: else -> break
		od
	}
}

/* Redis loses the blacklist keys of session 0. Then a token that is older than the one
   exchanged last is taken for stolen, even within the leeway. Nothing else may change. */
proctype Forget() {
	byte s = 0;
	d_step { S.blacklist = 0; forgot = true }
}

init {
	byte s = 0;
	byte n;
	atomic {
#ifdef SIGNUP
		hash = NO_ROW; replaced = ALL; cut_off = ALL;
		run Signup();
#else
		start(s, OLD); add(S.known, 1);
#endif
		n = 0; do :: n < LOGINS -> n++; run Login(n) :: else -> break od;
		n = 0; do :: n < REFRESH_0 -> n++; run Refresh(0) :: else -> break od;
		n = 0; do :: n < REFRESH_1 -> n++; run Refresh(1) :: else -> break od;
		n = 0; do :: n < REFRESH_2 -> n++; run Refresh(2) :: else -> break od;
		n = 0; do :: n < CLOCK -> n++; run Clock() :: else -> break od;
		n = 0; do :: n < DISABLE -> n++; run Disable() :: else -> break od;
#ifdef FORGET
		run Forget();
#endif
#ifdef REVOKE
		run Revoke(REVOKE);
#endif
#ifdef CHANGE
		run Change(0, NEW);
#endif
#ifdef CHANGE_1
		run Change(1, NEWER);
#endif
#ifdef REHASH
		run Rehash();
#endif
#ifdef RESET
		run Reset(MAILED);
#endif
#ifdef RESET_1
		run Reset(MAILED_1);
#endif
#ifdef DELETE
		run Delete();
#endif
#ifdef SQL
		run Sql();
#endif
#ifdef SQL_DISABLE
		run SqlDisable();
#endif
#ifdef ENABLE
		run Enable();
#endif
	}
}
