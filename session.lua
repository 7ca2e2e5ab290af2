-- session.lua keeps the sessions of one user. Each command is atomic and costs one round trip.
--
-- KEYS[1] is the user's index, user-sessions:{<userId>}: a sorted set of session ids, scored by
-- the second in which the session expires. The keys of the sessions and of exchanged refresh
-- tokens are made from the same {<userId>}, so all of them lie in one slot of a Redis Cluster.
--
-- ARGV[1] names the command, the rest are its parameters. Times are Unix seconds, or milliseconds
-- where the name ends in _ms. Lifetimes are seconds. The clock is Redis' own, the same for all
-- replicas of the server.
--
-- store.go puts the line "#!lua" before this text. It makes a Redis whose memory is full refuse
-- the script before it has done anything. Commands that only read and delete run under
-- "#!lua flags=allow-oom" instead, so that a full Redis can still end sessions.

-- max_sessions bounds what one user's sessions cost in memory, and in time to list or revoke.
local max_sessions = 100

local index = KEYS[1]
local user = string.match(index, '{.*}')

local clock = redis.call('TIME')
local now = tonumber(clock[1])
local now_ms = now * 1000 + math.floor(clock[2] / 1000)

local function session_key(sid)
  return 'session:' .. user .. ':' .. sid
end

local function blacklist_key(token)
  return 'blacklist:' .. user .. ':' .. token
end

-- read returns the fields of a session as a table. Without such a session the table is empty.
local function read(sid)
  local flat = redis.call('HGETALL', session_key(sid))
  local session = {}
  for i = 1, #flat, 2 do
    session[flat[i]] = flat[i + 1]
  end
  return session
end

-- remove ends a session. It only deletes, and returns how many sessions there were: 1 or 0.
local function remove(sid)
  redis.call('ZREM', index, sid)
  return redis.call('DEL', session_key(sid))
end

-- enter writes a session into the index until exp. The index lives as long as its last session.
local function enter(sid, exp)
  redis.call('ZADD', index, exp, sid)
  local last = redis.call('ZRANGE', index, -1, -1, 'WITHSCORES')
  redis.call('EXPIREAT', index, last[2])
end

-- make_room makes room for one more session. It forgets those that have expired and, if the user
-- still has max_sessions, ends the one that would expire first.
local function make_room()
  redis.call('ZREMRANGEBYSCORE', index, '-inf', now)
  local surplus = redis.call('ZCARD', index) - (max_sessions - 1)
  if surplus > 0 then
    for _, sid in ipairs(redis.call('ZRANGE', index, 0, surplus - 1)) do
      remove(sid)
    end
  end
end

-- exchanged_ms returns when a token was exchanged, or nil if that is no longer remembered.
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

-- rotate exchanges the refresh token shown for the one named next. It returns what came of it:
--
--   rotated  next is the session's token now; next, its iat and its exp follow
--   resent   shown was exchanged last, within the leeway; its successor, iat and exp follow
--   reused   shown was exchanged within the leeway; nothing has changed
--   theft    shown was exchanged before that, so somebody kept a copy; the session has ended
--   ended    the session has ended
--   stale    the session is bound to another password hash; nothing has changed
--
-- resend is '1' if the policy is to answer the token exchanged last with its successor.
function command.rotate(
  sid, next, digest, refresh_ttl, session_ttl, ip, agent, shown, leeway_ms, resend
)
  local session = read(sid)
  if not session.token then
    return {'ended'}
  end

  -- Only the session says which token is good, so losing a blacklist entry revives none.
  if session.token ~= shown then
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
  if session.token ~= shown then
    return {'resent', session.token, session.iat, session.exp}
  end

  local session_end = math.floor(session.created / 1000) + session_ttl
  local exp = math.min(now + refresh_ttl, session_end)
  if exp <= now then
    remove(sid)
    return {'ended'}
  end
  enter(sid, exp)
  if tonumber(leeway_ms) > 0 then
    redis.call('SET', blacklist_key(shown), now_ms, 'PX', leeway_ms)
  end
  redis.call('HSET', session_key(sid),
    'token', next, 'iat', now, 'exp', exp, 'previous', shown, 'exchanged', now_ms,
    'used', now_ms, 'ip', ip, 'agent', agent)
  redis.call('EXPIREAT', session_key(sid), exp)
  return {'rotated', next, tostring(now), tostring(exp)}
end

-- list returns five values for each session, one after the other: its id, the milliseconds of its
-- start and of its last use, ip and user agent.
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

-- revoke ends one session. It returns how many there were to end: 1 or 0.
function command.revoke(sid)
  return remove(sid)
end

-- revoke_all ends every session, and that of the caller also if the index has lost it.
function command.revoke_all(caller)
  for _, sid in ipairs(redis.call('ZRANGE', index, 0, -1)) do
    remove(sid)
  end
  remove(caller)
end

-- change_password ends every session but keep, and binds keep to the new password hash.
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

-- rehash binds the sessions of one password hash to another hash of the same password.
function command.rehash(old_digest, new_digest)
  for _, sid in ipairs(redis.call('ZRANGE', index, 0, -1)) do
    if redis.call('HGET', session_key(sid), 'digest') == old_digest then
      redis.call('HSET', session_key(sid), 'digest', new_digest)
    end
  end
end

return command[ARGV[1]](unpack(ARGV, 2)) or redis.status_reply('OK')
