-- session.lua keeps the sessions of one user. Each command is atomic and takes one round trip.
--
-- KEYS[1] is the user's index, user-sessions:{<userId>}: a sorted set of session ids, scored by
-- the second in which the session expires. The keys of the sessions and of exchanged refresh
-- tokens contain the same hash tag {<userId>}, so all of them lie in one slot of a Redis Cluster.
--
-- ARGV[1] is the name of the command, and the rest are its parameters. Lifetimes are seconds. Times
-- are Unix seconds, but created, used and exchanged are milliseconds, and so is every name that
-- ends in _ms. The clock is the one of Redis, so all replicas of the server have the same.
--
-- store.go puts a first line before this text. With "#!lua" a Redis whose memory is full refuses
-- to run the script at all, instead of failing in the middle. With "#!lua flags=allow-oom" it runs
-- the script. That is for commands that only read or delete, so that sessions can always be ended.

-- max_sessions bounds the memory that one user's sessions take, and the time to list or end them.
local max_sessions = 100

local index = KEYS[1]
local tag = string.match(index, '{.*}')

local clock = redis.call('TIME')
local now = tonumber(clock[1])
local now_ms = now * 1000 + math.floor(clock[2] / 1000)

local function session_key(sid)
  return 'session:' .. tag .. ':' .. sid
end

-- blacklist_key names the key that remembers when a token was exchanged.
local function blacklist_key(token)
  return 'blacklist:' .. tag .. ':' .. token
end

-- read returns the fields of a session as a table. The table is empty if there is no such session.
local function read(sid)
  local flat = redis.call('HGETALL', session_key(sid))
  local session = {}
  for i = 1, #flat, 2 do
    session[flat[i]] = flat[i + 1]
  end
  return session
end

-- remove ends a session. It only deletes. It returns 1 if there was such a session, else 0.
local function remove(sid)
  redis.call('ZREM', index, sid)
  return redis.call('DEL', session_key(sid))
end

-- enter adds a session to the index, or moves it there, to expire at exp. The index itself expires
-- with the session that expires last.
local function enter(sid, exp)
  redis.call('ZADD', index, exp, sid)
  local last = redis.call('ZRANGE', index, -1, -1, 'WITHSCORES')
  redis.call('EXPIREAT', index, last[2])
end

-- make_room makes room for one more session. It removes expired ones from the index. If the user
-- then still has max_sessions, it ends the one that would expire first.
local function make_room()
  redis.call('ZREMRANGEBYSCORE', index, '-inf', now)
  local surplus = redis.call('ZCARD', index) - (max_sessions - 1)
  if surplus > 0 then
    for _, sid in ipairs(redis.call('ZRANGE', index, 0, surplus - 1)) do
      remove(sid)
    end
  end
end

-- exchanged_ms returns when a token was exchanged, or nil if nothing remembers that.
local function exchanged_ms(session, token)
  local remembered = redis.call('GET', blacklist_key(token))
  if not remembered and session.previous == token then
    remembered = session.exchanged
  end
  return tonumber(remembered)
end

local command = {}

-- start opens a session whose refresh token is token. It returns that token, its iat and its exp.
function command.start(sid, token, digest, refresh_ttl, session_ttl, ip, agent)
  local exp = now + math.min(refresh_ttl, session_ttl)
  make_room()
  enter(sid, exp)
  redis.call('HSET', session_key(sid),
    'token', token, 'iat', now, 'exp', exp, 'digest', digest,
    'created', now_ms, 'used', now_ms, 'ip', ip, 'agent', agent)
  redis.call('EXPIREAT', session_key(sid), exp)
  return {'started', token, tostring(now), tostring(exp)}
end

-- rotate replaces the session's refresh token `shown` by the token `next`. It returns the outcome:
--
--   rotated  the session accepts next from now on; the reply also has next, its iat and its exp
--   resent   shown was exchanged last, within the leeway; the reply also has its successor
--   reused   shown was exchanged within the leeway; nothing has changed
--   theft    shown was exchanged longer ago, so somebody kept a copy; the session has ended
--   ended    the session has ended
--   stale    the session is bound to another password hash; nothing has changed
--
-- digest is that of the user's password hash. resend is '1' if the token exchanged last is to be
-- answered with its successor.
function command.rotate(
  sid, next, digest, refresh_ttl, session_ttl, ip, agent, shown, leeway_ms, resend
)
  local session = read(sid)
  if not session.token then
    return {'ended'}
  end
  local is_current = session.token == shown

  -- Only session.token decides which token is good, so a lost blacklist key cannot revive one.
  if not is_current then
    local exchanged = exchanged_ms(session, shown)
    if not exchanged or now_ms - exchanged > tonumber(leeway_ms) then
      remove(sid)
      return {'theft'}
    end
    if resend ~= '1' or session.previous ~= shown then
      return {'reused'}
    end
  end

  if session.digest ~= digest then
    return {'stale'}
  end
  if not is_current then
    return {'resent', session.token, session.iat, session.exp}
  end

  -- A session whose end has come is gone by its TTL, unless session_ttl has been lowered since.
  local session_end = math.floor(session.created / 1000) + session_ttl
  local exp = math.min(now + refresh_ttl, session_end)
  if exp <= now then
    remove(sid)
    return {'ended'}
  end
  enter(sid, exp)
  if tonumber(leeway_ms) > 0 then -- Redis does not accept a TTL of 0
    redis.call('SET', blacklist_key(shown), now_ms, 'PX', leeway_ms)
  end
  redis.call('HSET', session_key(sid),
    'token', next, 'iat', now, 'exp', exp, 'previous', shown, 'exchanged', now_ms,
    'used', now_ms, 'ip', ip, 'agent', agent)
  redis.call('EXPIREAT', session_key(sid), exp)
  return {'rotated', next, tostring(now), tostring(exp)}
end

-- list returns five values for each session, in one flat array: its id, the milliseconds in which
-- it was created and last used, its IP address and its user agent.
function command.list()
  local values = {}
  for _, sid in ipairs(redis.call('ZRANGE', index, 0, -1)) do
    local session = read(sid)
    if session.token then
      table.insert(values, sid)
      table.insert(values, session.created)
      table.insert(values, session.used)
      table.insert(values, session.ip)
      table.insert(values, session.agent)
    end
  end
  return values
end

-- revoke ends one session. It returns 1 if there was such a session, else 0.
function command.revoke(sid)
  return remove(sid)
end

-- revoke_all ends all sessions. It also ends the caller's session if the index has lost that.
function command.revoke_all(caller)
  for _, sid in ipairs(redis.call('ZRANGE', index, 0, -1)) do
    remove(sid)
  end
  remove(caller)
end

-- change_password ends all sessions except keep, and binds keep to the new password hash.
function command.change_password(keep, digest)
  for _, sid in ipairs(redis.call('ZRANGE', index, 0, -1)) do
    if sid ~= keep then
      remove(sid)
    end
  end
  if redis.call('EXISTS', session_key(keep)) == 1 then
    redis.call('HSET', session_key(keep), 'digest', digest)
  end
end

-- rehash binds the sessions that are bound to one password hash to another hash of that password.
function command.rehash(old_digest, new_digest)
  for _, sid in ipairs(redis.call('ZRANGE', index, 0, -1)) do
    if redis.call('HGET', session_key(sid), 'digest') == old_digest then
      redis.call('HSET', session_key(sid), 'digest', new_digest)
    end
  end
end

-- ready does nothing. Redis runs it only if it would also begin the other commands of this script.
function command.ready()
end

-- A command that returns nothing is answered with OK. (0 and the empty table are true in Lua.)
return command[ARGV[1]](unpack(ARGV, 2)) or redis.status_reply('OK')
